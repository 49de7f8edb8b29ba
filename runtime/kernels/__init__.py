"""What a device computes with: one backend object, chosen once for a device and passed on."""

import torch

from reshard.errors import MissingDependencyError, UsageError
from runtime.kernels.base import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The backend of a device: `cpu`, `cuda` or `npu`.

    Raises UsageError for any other, MissingDependencyError where an NPU is asked for and torch_npu cannot be imported.
    """
    if device.type == "cpu":
        from runtime.kernels.cpu import CpuKernels

        return CpuKernels()
    if device.type == "cuda":
        from runtime.kernels.cuda import CudaKernels

        return CudaKernels()
    if device.type == "npu":
        try:
            from runtime.kernels.npu import NpuKernels
        except ImportError as error:
            raise MissingDependencyError(
                f"device {device}: torch_npu cannot be imported ({error}); install the one that fits torch "
                f"{torch.__version__} and CANN: pip install 'reshard[npu]'"
            ) from error
        return NpuKernels()
    raise UsageError(f"device {device}: there is a backend for cpu, cuda and npu only")


__all__ = ["Kernels", "kernels_for"]
