"""Stand-ins, so that the real vllm-ascend builds, loads and runs dense layers on CPU tensors and gloo, without CANN.

torch_npu is imported with empty libraries in CANN's names (tests/npu/stubs.py), and its W8A8 kernels are
`tests.npu.stand_ins`. Everything else that runs is vllm-ascend's own. What they prove: that its code calls the loader,
the kernels and the collectives as it does on a device. What they do not prove: that a device computes the same.
"""

import sys
import types
from functools import cache
from typing import Any

import torch

from tests.npu import stand_ins as kernels


@cache
def put_in() -> list[torch.library.Library]:
    """Once in a process, before anything of vLLM is imported. The libraries must be kept, and are."""
    import torch_npu  # noqa: F401 - not at the top: without CANN's libraries it fails

    # PyPI's torchvision has no C++ operators for the CPU build of torch; vllm-ascend's patches import its Python code.
    _module("torchvision._meta_registrations")
    # What carries KV caches from prefill to decode nodes; a decode node's configuration names it.
    _module("mooncake", engine=_module("mooncake.engine", TransferEngine=object))
    torch.npu.current_device = lambda: torch.device("cpu")
    torch.Tensor.npu = lambda tensor, *_: tensor
    torch.npu.empty_cache = torch.npu.synchronize = lambda *_: None
    libraries = kernels.register()
    _groups()
    _platform()
    _operators()
    _all_reduce(libraries)
    _inspection()
    return libraries


def _module(name: str, **names: Any) -> types.ModuleType:
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(names)
    return module


def _groups() -> None:
    """gloo's groups have no HCCL communicator; layers with experts ask for its name, and use it where they run."""
    backend_of = torch.distributed.ProcessGroup._get_backend

    def get_backend(group: torch.distributed.ProcessGroup, device: torch.device) -> Any:
        if device.type == "npu":
            return types.SimpleNamespace(get_hccl_comm_name=lambda rank: "")
        return backend_of(group, device)

    torch.distributed.ProcessGroup._get_backend = get_backend


def _platform() -> None:
    """The Ascend platform, whose device is the CPU and whose collectives are gloo's."""
    from vllm_ascend.platform import NPUPlatform

    NPUPlatform.device_type = "cpu"
    NPUPlatform.dist_backend = "gloo"
    NPUPlatform.set_device = NPUPlatform.empty_cache = classmethod(lambda *_: None)


def _operators() -> None:
    """vllm-ascend's own operators (quantize, unquantized_gemm, ...): its functions, for tensors on the CPU."""
    from vllm.utils import torch_utils

    register = torch_utils.direct_register_custom_op

    def for_the_cpu(*args: Any, dispatch_key: str | None = None, **more: Any) -> None:
        register(*args, dispatch_key="CPU", **more)

    torch_utils.direct_register_custom_op = for_the_cpu


def _all_reduce(libraries: list[torch.library.Library]) -> None:
    """vLLM's all_reduce over tensor-parallel ranks, its own function: it was put in with the platform, for an NPU."""
    from vllm.distributed import parallel_state

    library = torch.library.Library("vllm", "IMPL")
    library.impl("all_reduce", parallel_state.all_reduce, "CPU")
    libraries.append(library)


def _inspection() -> None:
    """vLLM looks at a model's class in a process of its own, which would have no stand-ins: in this one."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()
