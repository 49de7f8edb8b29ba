"""The kernels in plain torch: what `cpu` and `cuda` share. They give only the two products."""

from abc import ABC, abstractmethod

import torch

_INT8_MIN, _INT8_MAX = -128, 127


class TorchKernels(ABC):
    """Everything but the products. Shapes: see `runtime.kernels.base`."""

    def has(self, scheme: str) -> bool:
        """Unquantised and W8A8."""
        return scheme in {"bf16", "w8a8_dynamic", "w8a8_static", "w8a8_mix"}

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return weight_NK

    def output_scale(self, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As it is."""
        return scale_N

    @abstractmethod
    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, N] in x's type."""

    @abstractmethod
    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, N] int32."""

    def swiglu(self, h_T2L: torch.Tensor) -> torch.Tensor:
        """[T, L] in h's type."""
        return _swiglu(h_T2L.float()).to(h_T2L.dtype)

    def quantise_dynamic(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, K] int8, [T] float32)."""
        x_TK = x_TK.float()
        scale_T = torch.linalg.vector_norm(x_TK, torch.inf, dim=-1) / _INT8_MAX
        # Where scale is 0 the quotient is no number, and that becomes 0. Subnormal scales are too coarse for 127.
        q_TK = (x_TK / scale_T[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).nan_to_num_(nan=0.0)
        return q_TK.to(torch.int8), scale_T

    def quantise_static(self, x_TK: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """[T, K] int8."""
        scaled = x_TK.float().mul(reciprocal).add_(offset).round_()
        return scaled.clamp_(_INT8_MIN, _INT8_MAX).nan_to_num_(nan=0.0).to(torch.int8)

    def int8_linear(
        self,
        q_TK: torch.Tensor,
        weight: torch.Tensor,
        scale_N: torch.Tensor,
        token_scale_T: torch.Tensor | None,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[T, N] in `dtype`."""
        sums = self.int8_matmul(q_TK, weight)
        if bias_N is not None:
            sums += bias_N
        y = sums.to(torch.float32).mul_(scale_N)
        if token_scale_T is not None:
            y.mul_(token_scale_T[:, None])
        return y.to(dtype)

    def dequant_swiglu_quant(
        self, h_T2L: torch.Tensor, scale_2L: torch.Tensor, token_scale_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, L] int8, [T] float32)."""
        h = h_T2L.to(torch.float32).mul_(scale_2L).mul_(token_scale_T[:, None])
        return self.quantise_dynamic(_swiglu(h))


def _swiglu(h_T2L: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float32; the left half of h is overwritten."""
    gate, up = h_T2L.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
