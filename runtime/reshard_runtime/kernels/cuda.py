"""CUDA, by torch's own kernels. No GPU was at hand: tests run on CPU tensors, `make test-cuda` waits for a device."""

import torch

from reshard.errors import ShardError
from reshard_runtime.kernels.base import Kernels

# cuBLASLt's int8 product takes more than 16 rows, and sizes that are multiples of 8 (aten/native/cuda/Blas.cpp).
_LEAST_ROWS = 17
_MULTIPLE = 8


class CudaKernels(Kernels):
    """Shapes: see `reshard_runtime.kernels.base`."""

    name = "cuda"

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        if weight_NK.dtype == torch.int8 and any(size % _MULTIPLE for size in weight_NK.shape):
            raise ShardError(
                f"{name}: {list(weight_NK.shape)}; the int8 product on cuda takes multiples of {_MULTIPLE} only: cut "
                "it with --pad, or for a smaller group"
            )
        return weight_NK

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        missing = max(0, _LEAST_ROWS - len(q_TK))
        padded = torch.nn.functional.pad(q_TK, (0, 0, 0, missing)) if missing else q_TK
        return torch._int_mm(padded, weight.t())[: len(q_TK)]
