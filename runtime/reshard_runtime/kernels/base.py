"""The kernels that a device must have.

Shapes: T tokens, K in_features, N out_features of a rank's part; L the rank's share of intermediate_size: a gate_up
product is [T, 2L], gate in the left half. int8 products are sums of K terms of at most 2^14 each, in int32: exact for
K up to 2^17.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from reshard.model.activation import Activation
from reshard_runtime.collectives import Collectives

Gated = Callable[[torch.Tensor], torch.Tensor]
"""act(gate) * up: [T, 2L] -> [T, L] in its type, computed in float32 and rounded once. It may overwrite its input."""

GatedInt8 = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""int32 sums [T, 2L], scale [2L], token_scale [T] -> float32 by both -> act(gate) * up -> as `quantize_dynamic`."""


class Kernels(Protocol):
    """One device's kernels. All results are new tensors; no call waits for the host."""

    name: str
    """A backend of the table of schemes, which says what it runs as it is stored; the rest becomes BF16 at load."""

    def collectives(self, group: torch.distributed.ProcessGroup) -> Collectives:
        """How the tokens travel over `group`."""

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        """The device's own form of a weight, once, after loading.

        Raises ShardError, naming the weight, where it is larger than the device's kernels take.
        """

    def output_scale(self, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The device's own form of a float32 scale that turns sums into `dtype` without a scale per token."""

    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x_TK @ weight_NK^T -> [T, N] in x's type, accumulated in float32."""

    def gated(self, activation: Activation) -> Gated:
        """The kernel of an activation whose formula is known, chosen once, when a layer is made."""

    def gated_int8(self, activation: Activation) -> GatedInt8 | None:
        """The same from sums to int8 in one; None where the device has no kernel of exactly that formula."""

    def quantize_dynamic(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Symmetric, per token: scale_T = max|x_T| / 127 (float32), q_TK = round(x / scale) (int8).

        As `npu_dynamic_quant` is documented. A token of zeros has scale 0 and zeros.
        """

    def quantize_static(self, x_TK: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """q_TK = clamp(round(x * reciprocal + offset), -128, 127) (int8), in float32.

        As `npu_quantize(..., div_mode=False)` is documented. reciprocal, offset: float32 [1].
        """

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """q_TK @ weight_NK^T -> [T, N] int32, exact."""

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
