"""What one rank computes of a dense layer: from everyone's tokens to its part of everyone's sums. No group, no wire.

Shapes: T tokens, H hidden_size, L the rank's share of intermediate_size; W what a token is on the way.
"""

import torch
from torch import nn

from reshard.errors import UsageError
from reshard.schemes.table import scheme_named
from reshard_runtime.kernels import Kernels, kernels_for
from reshard_runtime.linear import DynamicLinear, Mix, Tokens, make_linear
from reshard_runtime.shard import LayerShard


class PartialFFN(nn.Module):
    """down[:, own] @ (act(gate[own] x) * up[own] x): summed over the ranks, it is the layer's result.

    Args: as `reshard_runtime.ffn.DenseFFN` takes them. On the meta device only shapes and types are computed.

    What it holds stays as and where it was loaded, whatever `.to()` is called on a model around it.
    """

    def __init__(self, layer: LayerShard, kernels: Kernels | None, dtype: torch.dtype | None, mix: Mix) -> None:
        super().__init__()
        if mix not in ("dynamic", "static"):
            raise UsageError(f"mix is {mix!r}; it may be 'dynamic' or 'static'")
        self.device = layer.down.tensors["weight"].device
        self.kernels = kernels or kernels_for(self.device)
        self.dtype = _dtype_of(layer, dtype)
        self.hidden_size, self.intermediate_size = layer.hidden_size, layer.intermediate_size
        self.gate_up_proj = make_linear(layer.gate_up, self.kernels, mix, self.dtype)
        self.down_proj = make_linear(layer.down, self.kernels, mix, self.dtype)
        self.activation = layer.known_activation()
        self._gated = self.kernels.gated(self.activation)
        both_dynamic = isinstance(self.gate_up_proj, DynamicLinear) and isinstance(self.down_proj, DynamicLinear)
        self._gated_int8 = self.kernels.gated_int8(self.activation) if both_dynamic else None

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The tokens as they travel, quantized if the layer is: [T, W], W = H values, or H bytes and maybe a scale."""
        return self.gate_up_proj.pack(self.gate_up_proj.quantize(x_TH))

    def forward_packed(self, rows_TW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The partial sums [T, H] in `dtype` of tokens that have travelled."""
        return self._partial_sums(self.gate_up_proj.unpack(rows_TW), dtype)

    def forward_local(self, x_TH: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The partial sums [T, H] in `dtype` of tokens that are here."""
        return self._partial_sums(self.gate_up_proj.quantize(x_TH), dtype)

    def keep_not_finite(self, y_TH: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
        """What was made of this rank's tokens x_TH: NaN, maybe in place, where quantizing them hid NaN or infinity."""
        return self.gate_up_proj.keep_not_finite(y_TH, x_TH)

    def _partial_sums(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if self._gated_int8 is not None:
            q_TH, scale_T = tokens
            sums_T2L = self.kernels.int8_matmul(q_TH, gate_up.weight)
            return down.multiply(self._gated_int8(sums_T2L, gate_up.weight_scale, scale_T), dtype)
        h_TL = self._gated(gate_up.multiply(tokens, self.dtype))
        return down.keep_not_finite(down.multiply(down.quantize(h_TL), dtype), h_TL)

    def _apply(self, fn: object, recurse: bool = True) -> "PartialFFN":
        """Nothing: a model's `.to(dtype)` would round the scales. `forward` refuses tokens that no longer fit."""
        return self


def _dtype_of(layer: LayerShard, dtype: torch.dtype | None) -> torch.dtype:
    """The tokens' type: that of the weights that are not quantized."""
    for linear in layer.linears:
        own, is_float = linear.tensors["weight"].dtype, scheme_named(linear.scheme, linear.name).is_float
        if is_float and dtype not in (None, own):
            raise UsageError(f"dtype is {dtype}, {linear.name}.weight is {own}; weights are not cast")
        if is_float:
            dtype = own
    return dtype or torch.bfloat16
