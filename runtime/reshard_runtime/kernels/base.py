"""What a device computes with, in plain torch: a backend replaces what its device has kernels of its own for.

Shapes: T tokens, K in_features, N out_features of a rank's part; L the rank's share of intermediate_size: a gate_up
product is [T, 2L], gate in the left half. int8 products are sums of K terms of at most 2^14 each, in int32: exact for
K up to 2^17.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, linear, silu

from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard_runtime.collectives import Collectives

Gated = Callable[[torch.Tensor], torch.Tensor]
"""act(gate) * up: [T, 2L] -> [T, L] in its type, computed in float32 and rounded once. It may overwrite its input."""

GatedInt8 = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Exact sums [T, 2L], scale [2L], token_scale [T] -> float32 by both -> act(gate) * up -> as `quantize_dynamic`."""

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: silu,
    GELU: gelu,
    GELU_TANH: partial(gelu, approximate="tanh"),
}
_INT8_MIN, _INT8_MAX = -128, 127


class Kernels(ABC):
    """One device's kernels. All results are new tensors; no call waits for the host."""

    name: str
    """A backend of the table of schemes, which says what it runs as it is stored; the rest becomes BF16 at load."""

    def collectives(self, group: torch.distributed.ProcessGroup) -> Collectives:
        """How the tokens travel over a group."""
        return Collectives(group)

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        """The device's own form of a weight, once, after loading.

        Raises ShardError, naming the weight, where it is larger than the device's kernels take.
        """
        return weight_NK

    def output_scale(self, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The device's own form of a float32 scale that turns sums into `dtype` without a scale per token."""
        return scale_N

    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x_TK @ weight_NK^T -> [T, N] in x's type, accumulated in float32."""
        return linear(x_TK, weight)

    @abstractmethod
    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """q_TK @ weight_NK^T -> [T, N], exact: int32, or float32 where no sum is above 2^24."""

    def gated(self, activation: Activation) -> Gated:
        """The kernel of an activation whose formula is known, chosen once, when a layer is made."""
        formula = gated(activation)
        return lambda h_T2L: formula(h_T2L.float()).to(h_T2L.dtype)

    def gated_int8(self, activation: Activation) -> GatedInt8 | None:
        """The same from sums to int8 in one; None where the device has no kernel of exactly that formula."""
        formula = gated(activation)

        def run(
            h_T2L: torch.Tensor, scale_2L: torch.Tensor, token_scale_T: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            h = h_T2L.to(torch.float32).mul_(scale_2L).mul_(token_scale_T[:, None])
            return self.quantize_dynamic(formula(h))

        return run

    def quantize_dynamic(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Symmetric, per token: scale_T = max|x_T| / 127 (float32), q_TK = round(x / scale) (int8).

        As `npu_dynamic_quant` is documented. A token of zeros has scale 0 and zeros.
        """
        x_TK = x_TK.float()
        scale_T = torch.linalg.vector_norm(x_TK, torch.inf, dim=-1) / _INT8_MAX
        # Where scale is 0 the quotient is no number, and that becomes 0. Subnormal scales are too coarse for 127.
        q_TK = (x_TK / scale_T[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).nan_to_num_(nan=0.0)
        return q_TK.to(torch.int8), scale_T

    def quantize_static(self, x_TK: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """q_TK = clamp(round(x * reciprocal + offset), -128, 127) (int8), in float32.

        As `npu_quantize(..., div_mode=False)` is documented. reciprocal, offset: float32 [1].
        """
        scaled = x_TK.float().mul(reciprocal).add_(offset).round_()
        return scaled.clamp_(_INT8_MIN, _INT8_MAX).nan_to_num_(nan=0.0).to(torch.int8)

    def keep_not_finite(self, y_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """y_TN, in place NaN for a token of x_TK that has NaN or an infinity, which int8 with a fixed scale has not."""
        wrong_T = (x_TK - x_TK).sum(-1).isnan()
        return y_TN.masked_fill_(wrong_T[:, None], torch.nan)

    def int8_linear(
        self,
        q_TK: torch.Tensor,
        weight: torch.Tensor,
        scale_N: torch.Tensor,
        token_scale_T: torch.Tensor | None,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """(q @ weight^T + bias) * scale [* token_scale] -> [T, N] in `dtype`, scaled in float32.

        As `npu_quant_matmul` is documented. bias: int32. scale: float32, or what `output_scale` made of it where
        there is no token_scale.
        """
        sums = self.int8_matmul(q_TK, weight)
        if bias_N is not None:
            sums = sums.to(torch.int32).add_(bias_N)
        y = sums.to(torch.float32).mul_(scale_N)
        if token_scale_T is not None:
            y.mul_(token_scale_T[:, None])
        return y.to(dtype)


def gated(activation: Activation) -> Gated:
    """act(gate) * up in the type of what it reads, and with a limit into that."""
    function, limit = FUNCTIONS[activation.name], activation.limit

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
