"""How tokens travel to the engine's gate_up linear: quantized where its kernel takes them so, else as they are.

Shapes: T tokens, H hidden_size, L the rank's share of intermediate_size.
"""

from typing import Any, Protocol

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from reshard_runtime.serving.vllm.ascend import is_platform
from reshard_runtime.tokens import pack, unpack

_log = init_logger("vllm.denseffn_shards")


class Travel(Protocol):
    """A way there. `multiply(pack(x))` is the engine's own result, bit for bit."""

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What travels, a row for each token; a row depends on its token alone."""

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """gate_up's product of the tokens in the rows: [T, 2L]."""


def product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The engine's product of a rank's own weights, without what its linear does to tokens before and after."""
    return linear.quant_method.apply(linear, x, None)


class Passthrough:
    """The engine's linear quantizes, if it does, after the gather."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H]."""
        return x_TH

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        return product(self._linear, rows_TW)


class OneDnnInt8:
    """vLLM's int8 linear on the CPU, with a scale for each token: the two halves of its kernel, called apart."""

    def __init__(self, linear: nn.Module, kernel: Any, dtype: torch.dtype) -> None:
        from vllm import _custom_ops

        self._ops, self._linear, self._kernel, self._dtype = _custom_ops, linear, kernel, dtype

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H + 4] bytes."""
        q_TH, scale_T1, _ = self._ops.onednn_scaled_int8_quant(x_TH, None, None, True)
        return pack(q_TH, scale_T1)

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        q_TH, scale_T = unpack(rows_TW)
        *_, adjustment = self._kernel._get_layer_params(self._linear)
        handler = self._kernel.dnnl_handler
        out = torch.empty(len(rows_TW), handler.n, dtype=self._dtype)
        self._ops.onednn_scaled_mm(handler, q_TH, out, scale_T[:, None], None, adjustment, None)
        return out


class AscendDynamic:
    """vllm-ascend's W8A8_DYNAMIC: `npu_dynamic_quant` here, `npu_quant_matmul` there, on weights as it keeps them."""

    def __init__(self, linear: nn.Module, dtype: torch.dtype) -> None:
        import torch_npu

        self._npu, self._linear, self._dtype = torch_npu, linear, dtype

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H + 4] bytes."""
        return pack(*self._npu.npu_dynamic_quant(x_TH))

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        q_TH, scale_T = unpack(rows_TW)
        return self._npu.npu_quant_matmul(
            q_TH,
            self._linear.weight,
            self._linear.weight_scale,
            pertoken_scale=scale_T,
            output_dtype=self._dtype,
        )


class AscendStatic:
    """vllm-ascend's W8A8: its quantize operator here; its linear takes int8 as tokens that are quantized already."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear

    def pack(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] int8."""
        linear = self._linear
        scales = linear.aclnn_input_scale, linear.aclnn_input_scale_reciprocal
        return torch.ops.vllm.quantize(x_TH, *scales, linear.aclnn_input_offset)

    def multiply(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[T, 2L]."""
        return product(self._linear, rows_TW)


def travel_of(linear: nn.Module, dtype: torch.dtype) -> Travel:
    """The way to a linear that the engine has finished loading; `dtype` is the tokens'."""
    method = linear.quant_method
    kernel = getattr(getattr(linear, "scheme", None), "kernel", None)
    if kernel is not None and _is_onednn_int8(kernel):
        return OneDnnInt8(linear, kernel, dtype)
    if is_platform() and (way := _ascends(linear, dtype)):
        return way
    if not isinstance(method, UnquantizedLinearMethod):
        _log.warning_once(
            "denseffn_shards: tokens travel in %s and are quantized after the gather: no way is known to send them "
            "quantized to %s",
            dtype,
            type(getattr(method, "quant_method", method)).__name__,
        )
    return Passthrough(linear)


def _is_onednn_int8(kernel: Any) -> bool:
    """Exactly that kernel, in its oneDNN form, one scale for each token and no offset."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    return (
        type(kernel) is CPUInt8ScaledMMLinearKernel
        and getattr(kernel, "linear_method", None) == kernel._apply_weights_onednn
        and kernel.config.input_symmetric
        and not kernel.config.is_static_input_scheme
    )


def _ascends(linear: nn.Module, dtype: torch.dtype) -> Travel | None:
    """By the exact scheme: one that is derived from it may quantize tokens to another type."""
    from vllm_ascend.quantization import methods

    scheme: Any = getattr(linear.quant_method, "quant_method", None)
    if type(scheme) is methods.AscendW8A8PDMixLinearMethod:  # static in decode nodes, dynamic elsewhere
        scheme = scheme._static_method if linear.is_kv_consumer else scheme._dynamic_method
    if type(scheme) is methods.AscendW8A8DynamicLinearMethod:
        return AscendDynamic(linear, dtype)
    if type(scheme) is methods.AscendW8A8LinearMethod:
        return AscendStatic(linear)
    return None
