"""What a device computes with: one backend object, chosen once for a device and passed on."""

import torch

from reshard.errors import MissingDependencyError, UsageError
from reshard_runtime.kernels.base import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The backend of a device: `cpu`, `cuda` or `npu`.

    Raises UsageError for any other, MissingDependencyError where an NPU is asked for and torch_npu cannot be imported.
    """
    if device.type == "cpu":
        from reshard_runtime.kernels.cpu import CpuKernels

        return CpuKernels()
    if device.type == "cuda":
        from reshard_runtime.kernels.cuda import CudaKernels

        return CudaKernels()
    if device.type == "npu":
        try:
            from reshard_runtime.kernels.npu import NpuKernels
        except ImportError as error:
            raise _no_npu(str(device), error) from error
        return NpuKernels()
    raise UsageError(f"device {device}: there is a backend for cpu, cuda and npu only")


def device_of(device: str | torch.device) -> torch.device:
    """The device of a name. Raises UsageError, or MissingDependencyError for an NPU without torch_npu."""
    name = str(device)
    try:
        if name.split(":")[0] == "npu":
            import torch_npu  # noqa: F401 - torch knows the name only with it
        return torch.device(device)
    except ImportError as error:
        raise _no_npu(name, error) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"device {name}: {str(error).splitlines()[0]}") from error


def _no_npu(device: str, error: ImportError) -> MissingDependencyError:
    fits = f", in the version that fits torch {torch.__version__} and CANN"
    return MissingDependencyError(f"device {device}", "torch_npu", error, fits)


__all__ = ["Kernels", "device_of", "kernels_for"]
