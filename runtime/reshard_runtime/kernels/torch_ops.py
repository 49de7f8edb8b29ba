"""The kernels in plain torch: what `cpu` and `cuda` share. They give only the two products."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard_runtime.kernels.base import Gated, GatedInt8

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: silu,
    GELU: gelu,
    GELU_TANH: partial(gelu, approximate="tanh"),
}
_INT8_MIN, _INT8_MAX = -128, 127


class TorchKernels(ABC):
    """Everything but the products. Shapes: see `reshard_runtime.kernels.base`."""

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

    def gated(self, activation: Activation) -> Gated:
        """[T, L] in h's type."""
        formula = gated(activation)
        return lambda h_T2L: formula(h_T2L.float()).to(h_T2L.dtype)

    def gated_int8(self, activation: Activation) -> GatedInt8:
        """([T, L] int8, [T] float32)."""
        formula = gated(activation)

        def run(
            h_T2L: torch.Tensor, scale_2L: torch.Tensor, token_scale_T: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            h = h_T2L.to(torch.float32).mul_(scale_2L).mul_(token_scale_T[:, None])
            return self.quantize_dynamic(formula(h))

        return run

    def quantize_dynamic(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([T, K] int8, [T] float32)."""
        x_TK = x_TK.float()
        scale_T = torch.linalg.vector_norm(x_TK, torch.inf, dim=-1) / _INT8_MAX
        # Where scale is 0 the quotient is no number, and that becomes 0. Subnormal scales are too coarse for 127.
        q_TK = (x_TK / scale_T[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).nan_to_num_(nan=0.0)
        return q_TK.to(torch.int8), scale_T

    def quantize_static(self, x_TK: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
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


def gated(activation: Activation) -> Gated:
    """act(gate) * up in the type of what it reads, and with a limit into that."""
    function, limit = _FUNCTIONS[activation.name], activation.limit

    def run(h_T2L: torch.Tensor) -> torch.Tensor:
        gate, up = clamped(h_T2L, limit).chunk(2, dim=-1)
        return function(gate).mul_(up)

    return run


def clamped(h_T2L: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Gate to at most the limit, up to within it, in place. NaN stays NaN."""
    if limit is not None:
        gate, up = h_T2L.chunk(2, dim=-1)
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit)
    return h_T2L
