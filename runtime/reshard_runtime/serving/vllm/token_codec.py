"""How tokens travel to the engine's gate_up linear: quantized where its kernel takes them so, else as they are.

Shapes: T tokens, H hidden_size, L the rank's share of intermediate_size, W what a row is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from reshard_runtime.serving.vllm.ascend import is_platform
from reshard_runtime.tokens import pack, unpack

_log = init_logger("vllm.denseffn_shards")


@dataclass(frozen=True)
class TokenCodec:
    """A way there: `multiply(pack(x))` is the engine's own result, bit for bit.

    pack: [T, H] -> [T, W], a row for each token, which depends on that token alone. multiply: [T, W] -> [T, 2L].
    """

    name: str
    pack: Callable[[torch.Tensor], torch.Tensor]
    multiply: Callable[[torch.Tensor], torch.Tensor]


def product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The engine's product of a rank's own weights, without what its linear does to tokens before and after."""
    return linear.quant_method.apply(linear, x, None)


def codec_of(linear: nn.Module, dtype: torch.dtype) -> TokenCodec:
    """The way to a linear that the engine has finished loading; `dtype` is the tokens'."""
    method = linear.quant_method
    kernel = getattr(getattr(linear, "scheme", None), "kernel", None)
    if kernel is not None and _is_onednn_int8(kernel):
        return _onednn_int8(linear, kernel, dtype)
    if is_platform() and (codec := _ascends(linear, dtype)):
        return codec
    if not isinstance(method, UnquantizedLinearMethod):
        _log.warning_once(
            "denseffn_shards: tokens travel in %s and are quantized after the gather: no way is known to send them "
            "quantized to %s",
            dtype,
            type(getattr(method, "quant_method", method)).__name__,
        )
    return passthrough(linear)


def passthrough(linear: nn.Module) -> TokenCodec:
    """W = H values. The engine's linear quantizes, if it does, after the gather."""
    return TokenCodec("passthrough", lambda x_TH: x_TH, lambda rows_TW: product(linear, rows_TW))


def _onednn_int8(linear: nn.Module, kernel: Any, dtype: torch.dtype) -> TokenCodec:
    """VLLM's int8 linear on the CPU, with a scale for each token: the two halves of its kernel. W = H + 4 bytes."""
    from vllm import _custom_ops as ops

    def quantize(x_TH: torch.Tensor) -> torch.Tensor:
        q_TH, scale_T1, _ = ops.onednn_scaled_int8_quant(x_TH, None, None, True)
        return pack(q_TH, scale_T1)

    def multiply(rows_TW: torch.Tensor) -> torch.Tensor:
        q_TH, scale_T = unpack(rows_TW)
        *_, adjustment = kernel._get_layer_params(linear)
        handler = kernel.dnnl_handler
        out = torch.empty(len(rows_TW), handler.n, dtype=dtype)
        ops.onednn_scaled_mm(handler, q_TH, out, scale_T[:, None], None, adjustment, None)
        return out

    return TokenCodec("oneDNN int8", quantize, multiply)


def _is_onednn_int8(kernel: Any) -> bool:
    """Exactly that kernel, in its oneDNN form, one scale for each token and no offset."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    return (
        type(kernel) is CPUInt8ScaledMMLinearKernel
        and getattr(kernel, "linear_method", None) == kernel._apply_weights_onednn
        and kernel.config.input_symmetric
        and not kernel.config.is_static_input_scheme
    )


def _ascends(linear: nn.Module, dtype: torch.dtype) -> TokenCodec | None:
    """By the exact scheme: one that is derived from it may quantize tokens to another type."""
    from vllm_ascend.quantization import methods

    scheme: Any = getattr(linear.quant_method, "quant_method", None)
    if type(scheme) is methods.AscendW8A8PDMixLinearMethod:  # static in decode nodes, dynamic elsewhere
        scheme = scheme._static_method if linear.is_kv_consumer else scheme._dynamic_method
    if type(scheme) is methods.AscendW8A8DynamicLinearMethod:
        return _ascend_dynamic(linear, dtype)
    if type(scheme) is methods.AscendW8A8LinearMethod:
        return _ascend_static(linear)
    return None


def _ascend_dynamic(linear: nn.Module, dtype: torch.dtype) -> TokenCodec:
    """W8A8_DYNAMIC: `npu_dynamic_quant` here, `npu_quant_matmul` there, on its weights. W = H + 4 bytes."""
    import torch_npu

    def multiply(rows_TW: torch.Tensor) -> torch.Tensor:
        q_TH, scale_T = unpack(rows_TW)
        return torch_npu.npu_quant_matmul(
            q_TH, linear.weight, linear.weight_scale, pertoken_scale=scale_T, output_dtype=dtype
        )

    return TokenCodec("Ascend dynamic", lambda x_TH: pack(*torch_npu.npu_dynamic_quant(x_TH)), multiply)


def _ascend_static(linear: nn.Module) -> TokenCodec:
    """W8A8: its quantize operator here; its linear takes int8 as tokens that are quantized already. W = H bytes."""

    def quantize(x_TH: torch.Tensor) -> torch.Tensor:
        scales = linear.aclnn_input_scale, linear.aclnn_input_scale_reciprocal
        return torch.ops.vllm.quantize(x_TH, *scales, linear.aclnn_input_offset)

    return TokenCodec("Ascend static", quantize, lambda rows_TW: product(linear, rows_TW))
