"""How tokens travel to the engine's gate_up linear: quantised where its kernel takes them so, else as they are.

Shapes: T tokens, H hidden_size, L the rank's share of intermediate_size.
"""

from typing import Any, Protocol

import torch
from torch import nn

_SCALE_BYTES = 4


class Travel(Protocol):
    """A way there. `multiply(pack(x))` is the linear's own result, bit for bit."""

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What travels, a row for each token."""

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """gate_up's product of the tokens in the rows: [T, 2L]."""


class AsTheyAre:
    """The engine's linear quantises, if it does, after the gather."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H]."""
        return x_TH

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        return self._linear(rows_TW)[0]


class OneDnnInt8:
    """vLLM's int8 linear on the CPU, with a scale for each token: the two halves of its kernel, called apart."""

    def __init__(self, linear: nn.Module, kernel: Any, dtype: torch.dtype) -> None:
        from vllm import _custom_ops

        self._ops, self._linear, self._kernel, self._dtype = _custom_ops, linear, kernel, dtype

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H + 4] bytes: the integers and the scale."""
        q_TH, scale_T1, _ = self._ops.onednn_scaled_int8_quant(x_TH, None, None, True)
        return torch.cat([q_TH, scale_T1.view(torch.int8)], dim=1)

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        q_TH, scale = rows_TW.split([rows_TW.shape[1] - _SCALE_BYTES, _SCALE_BYTES], dim=1)
        *_, adjustment = self._kernel._get_layer_params(self._linear)
        handler = self._kernel.dnnl_handler
        out = torch.empty(len(rows_TW), handler.n, dtype=self._dtype)
        scale_T1 = scale.contiguous().view(torch.float32)
        self._ops.onednn_scaled_mm(handler, q_TH.contiguous(), out, scale_T1, None, adjustment, None)
        return out


def travel_of(linear: nn.Module, dtype: torch.dtype) -> Travel:
    """The way to a linear that the engine has finished loading; `dtype` is the tokens'."""
    kernel = getattr(getattr(linear, "scheme", None), "kernel", None)
    if kernel is not None and _is_onednn_int8(kernel):
        return OneDnnInt8(linear, kernel, dtype)
    return AsTheyAre(linear)


def _is_onednn_int8(kernel: Any) -> bool:
    """Exactly that kernel, in its oneDNN form, one scale for each token and no offset."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    return (
        type(kernel) is CPUInt8ScaledMMLinearKernel
        and getattr(kernel, "linear_method", None) == kernel._apply_weights_onednn
        and kernel.config.input_symmetric
        and not kernel.config.is_static_input_scheme
    )
