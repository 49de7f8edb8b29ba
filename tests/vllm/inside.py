"""vLLM's own loading and layers without its server: what runs in each process of a `tests.support.distributed.Ranks`.

The processes are one job to vLLM, as its workers are. Each function takes the group first.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support.reads import Reads, counted
from tests.vllm.models import attention_backend

OPTION = "denseffn_tensor_parallel_size"


@dataclasses.dataclass(frozen=True)
class Served:
    """What a user would say on vLLM's command line. `shards` None: the engine's own loader."""

    model: Path
    shards: Path | None = None
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    option: Any = None
    dtype: str = "float32"
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    additional: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)


_joined: list[tuple[int, ...]] = []
_numbers = itertools.count()


def config_of(served: Served) -> Any:
    """The VllmConfig of this process, which has joined its groups."""
    config = engine_config(served)
    _join(config)
    return config


def engine_config(served: Served) -> Any:
    """What vLLM makes of the command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import utils
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    utils._model_to_pp_missing_layer_names.clear()  # by id(model): a later model may have that of one let go
    rank, own = dist.get_rank(), served.tensor * served.pipeline  # own: a data-parallel rank's processes
    arguments: dict[str, Any] = {
        "model": str(served.model),
        "skip_tokenizer_init": True,
        "dtype": served.dtype,
        "max_model_len": 256,
        "enforce_eager": True,
        "tensor_parallel_size": served.tensor,
        "pipeline_parallel_size": served.pipeline,
        "additional_config": served.additional | ({} if served.option is None else {OPTION: served.option}),
    }
    if current_platform.is_cpu():
        arguments |= {"attention_backend": attention_backend()}
    if served.data > 1:
        arguments |= {"data_parallel_size": served.data, "data_parallel_rank": rank // own}
        arguments |= {"data_parallel_address": "127.0.0.1", "data_parallel_rpc_port": 29550}
    if served.shards is not None:
        arguments |= {"load_format": "denseffn_shards"}
        arguments |= {"model_loader_extra_config": {"shards": str(served.shards), **served.extra}}
    return EngineArgs(**arguments | served.engine).create_engine_config(headless=True)


def _join(config: Any) -> None:
    """Make vLLM's groups, once in a process for each layout."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import destroy_model_parallel
    from vllm.model_executor.kernels.linear.scaled_mm import cpu as int8_kernels
    from vllm.v1.worker import cpu_model_runner
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    cpu_model_runner._torch_cuda_wrapper  # noqa: B018 - the import is what counts
    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    # Where the processor has AMX, vLLM takes another int8 kernel, for which tokens travel as they are. What is tested
    # here is oneDNN's, which every processor has.
    int8_kernels.check_cpu_sgl_kernel = lambda *sizes: False
    parallel = config.parallel_config
    layout = (
        parallel.data_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.tensor_parallel_size,
        config.model_config.is_moe,  # which has a group for its experts
    )
    if _joined != [layout]:
        if _joined:
            destroy_model_parallel()
        _joined[:] = [layout]
        # vLLM's CPU worker names its shared memory so, where the processor has AVX-512. Processes that were killed
        # leave theirs behind.
        first = [os.getpid()]
        dist.broadcast_object_list(first)
        os.environ["VLLM_DIST_IDENT"] = f"{first[0]}-{next(_numbers)}"
        with set_current_vllm_config(config):
            init_worker_distributed_environment(config, dist.get_rank() % parallel.world_size, "env://", 0, "gloo")


@contextlib.contextmanager
def loaded(served: Served) -> Iterator[tuple[Any, Any]]:
    """(config, model)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = config_of(served)
    with set_current_vllm_config(config):
        yield config, get_model(vllm_config=config)


def unprocessed(config: Any) -> Any:
    """The model with its weights as they were loaded, before kernels have packed them."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model

    with set_current_vllm_config(config), mock.patch.object(base_loader, "process_weights_after_loading"):
        return get_model(vllm_config=config)


def parameters(group: dist.ProcessGroup, served: Served) -> dict[str, torch.Tensor]:
    """Every parameter, as it was loaded."""
    model = unprocessed(config_of(served))
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def reads(group: dist.ProcessGroup, served: Served) -> Reads:
    """What loading it reads of its model and of its sets."""
    config = config_of(served)
    with counted(served.model, *([] if served.shards is None else [served.shards])) as found:
        unprocessed(config)
    return found


def load(group: dist.ProcessGroup, served: Served) -> str:
    """Load it and let it go; what was raised."""
    try:
        unprocessed(config_of(served))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@contextlib.contextmanager
def nothing_is_built() -> Iterator[None]:
    """No DeepSeek model can be."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

    with mock.patch.object(DeepseekV2ForCausalLM, "__init__", side_effect=AssertionError("the model is built")):
        yield


def load_unbuilt(group: dist.ProcessGroup, served: Served) -> str:
    """As `load`: what is raised before anything is built."""
    with nothing_is_built():
        return load(group, served)


def load_while_replaced(group: dist.ProcessGroup, served: Served, by: Path, at: str, time: int) -> str:
    """The same, its set replaced `by` another when `at`, a name in the plugin's loader, is called the time-th time."""
    from reshard_runtime.serving.vllm import loader

    met: list[str] = []
    called = getattr(loader, at)

    def late(*args: Any, **kw: Any) -> Any:
        met.append(at)
        if len(met) == time:
            dist.barrier(group)
            if group.rank() == 0 and served.shards is not None:
                for file in [*sorted(served.shards.glob("denseffn-*")), served.shards / "manifest.json"]:
                    shutil.copy(by / file.name, by / "next")
                    (by / "next").replace(file)
            dist.barrier(group)
        return called(*args, **kw)

    with mock.patch.object(loader, at, late):
        said = load(group, served)
    assert len(met) >= time
    return said


def load_changed(group: dist.ProcessGroup, served: Served, changed: str, skipped: bool) -> str:
    """As `load`, by a model whose load_weights doubles a tensor, as some normalize one, or is `skipped` by it."""
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

    load_weights = DeepseekV2ForCausalLM.load_weights

    def change(model: Any, weights: Any) -> Any:
        other = ((name, 2 * value if name == changed else value) for name, value in weights)
        return load_weights(model, ((name, value) for name, value in other if not (skipped and name == changed)))

    with mock.patch.object(DeepseekV2ForCausalLM, "load_weights", change):
        return load(group, served)


@contextlib.contextmanager
def _engine_with(limit: float | None, where: str) -> Iterator[None]:
    """An engine whose dense MLP has a limit, in its activation or in its forward, which no vLLM has for it yet."""
    from vllm.model_executor.layers.activation import SiluAndMulWithClamp
    from vllm.model_executor.models import deepseek_v2

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        assert limit is not None
        gate, up = mlp.gate_up_proj(x)[0].chunk(2, dim=-1)
        return mlp.down_proj(mlp.act_fn(torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], dim=-1)))[0]

    if limit is None:
        yield
    elif where == "activation":
        with mock.patch.object(deepseek_v2, "SiluAndMul", partial(SiluAndMulWithClamp, limit)):
            yield
    else:
        with mock.patch.object(deepseek_v2.DeepseekV2MLP, "forward", forward):
            yield


def load_with(group: dist.ProcessGroup, served: Served, limit: float | None, where: str) -> str:
    """As `load`, in an engine with a limit."""
    with _engine_with(limit, where):
        return load(group, served)


def forward_with(
    group: dist.ProcessGroup, served: Served, limit: float, counts: list[list[int]]
) -> list[list[torch.Tensor]]:
    """As `forward`, in an engine whose activation has a limit."""
    with _engine_with(limit, "activation"):
        return forward(group, served, counts)


def tokens(rank: int, count: int, hidden: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """This rank's own."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def forward(group: dist.ProcessGroup, served: Served, counts: list[list[int]]) -> list[list[torch.Tensor]]:
    """The MLPs' results of each of `counts` (a token count for each rank), layer by layer."""
    from vllm.forward_context import set_forward_context

    results = []
    with loaded(served) as (config, model), torch.inference_mode():
        for each in counts:
            rank = dist.get_rank()
            x = tokens(rank // served.tensor, each[rank], dtype=config.model_config.dtype)
            with set_forward_context(None, config, num_tokens=len(x)):
                results.append([layer.mlp(x).clone() for layer in _held(model)])
    return results


def _held(model: Any) -> list[Any]:
    """The decoder layers of this pipeline stage, a wrapper's too."""
    model = getattr(model, "language_model", model)
    return list(model.model.layers[model.model.start_layer : model.model.end_layer])


def forward_of(group: dist.ProcessGroup, served: Served, owner: int, count: int) -> list[torch.Tensor]:
    """The MLPs' results of one rank's tokens, which all ranks have: tensor parallelism."""
    from vllm.forward_context import set_forward_context

    with loaded(served) as (config, model), torch.inference_mode():
        x = tokens(owner, count, dtype=config.model_config.dtype)
        with set_forward_context(None, config, num_tokens=count):
            return [layer.mlp(x).clone() for layer in model.model.layers]


def w8a8_forward(group: dist.ProcessGroup, served: Served, counts: list[int]) -> dict[str, Any]:
    """A W8A8 layer's result with tokens that travel quantized and as they are, and the bytes of a row."""
    from vllm.forward_context import set_forward_context

    from reshard_runtime.serving.vllm.token_codec import passthrough

    with loaded(served) as (config, model), torch.inference_mode():
        mlp = model.model.layers[0].mlp
        hidden = config.model_config.hf_config.hidden_size
        x = tokens(dist.get_rank(), counts[dist.get_rank()], hidden, config.model_config.dtype)
        with set_forward_context(None, config, num_tokens=len(x)):
            quantized = mlp(x).clone()
            codec = mlp.codec
            mlp.codec = passthrough(mlp.gate_up_proj)
            plain = mlp(x).clone()
        packed = codec.pack(x)
        return {
            "codec": codec.name,
            "quantized": quantized,
            "plain": plain,
            "ratio": packed.nbytes / x.nbytes,
        }


def loaded_again(group: dist.ProcessGroup, served: Served) -> tuple[str, str, bool]:
    """What an engine is told that reloads from disk, one that is sent weights, and whether the layer is the same."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def told(weights: Any) -> str:
        try:
            GPUModelRunner.reload_weights(runner, weights)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    with loaded(served) as (config, model):
        runner = mock.Mock(vllm_config=config, model_config=config.model_config, load_config=config.load_config)
        runner.get_model.return_value = model
        linear = model.model.layers[0].mlp.gate_up_proj
        before = linear(tokens(0, 3))[0]
        from_disk = told(None)
        same = torch.equal(linear(tokens(0, 3))[0], before)
        return from_disk, told(iter([("model.layers.0.mlp.gate_proj.weight", torch.zeros(512, 256))])), same


def without_counts(group: dist.ProcessGroup, served: Served) -> str:
    """What a layer says where the engine gives no token counts."""
    from vllm.forward_context import create_forward_context, override_forward_context

    with loaded(served) as (config, model):
        try:
            with override_forward_context(create_forward_context(None, config, dp_metadata=None)):
                model.model.layers[0].mlp(tokens(0, 3))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def with_wrong_counts(group: dist.ProcessGroup, served: Served) -> str:
    """What a layer says where the engine's counts are not those of its tokens."""
    from vllm.forward_context import DPMetadata, create_forward_context, override_forward_context

    with loaded(served) as (config, model):
        metadata = DPMetadata(torch.tensor([3, 3], dtype=torch.int32))
        try:
            with override_forward_context(create_forward_context(None, config, dp_metadata=metadata)):
                model.model.layers[0].mlp(tokens(0, 4))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def largest_tensor(group: dist.ProcessGroup, served: Served) -> int:
    """Elements of the largest tensor of two dimensions that any operator returned, building and loading the model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2:
                self.largest = max(self.largest, result.numel())
            return result

    with Watch() as watch:
        unprocessed(config_of(served))
    return watch.largest


def graph_of(group: dist.ProcessGroup, served: Served, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(eager, compiled, graphs) of a layer under torch.compile without graph breaks."""
    from vllm.forward_context import set_forward_context

    with loaded(served) as (config, model), torch.inference_mode():
        mlp = model.model.layers[0].mlp
        x = tokens(dist.get_rank(), counts[dist.get_rank()])
        graphs: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        with set_forward_context(None, config, num_tokens=len(x)):
            eager = mlp(x).clone()
            compiled = torch.compile(lambda x: mlp(x) + 0, backend=backend, fullgraph=True)(x).clone()
    return eager, compiled, len(graphs)


def draft(group: dist.ProcessGroup, served: Served) -> dict[str, torch.Tensor]:
    """Parameters of a model that is loaded as another's draft."""
    config = config_of(served)
    config.model_config.runner_type = "draft"
    return {name: value.detach().clone() for name, value in unprocessed(config).named_parameters()}
