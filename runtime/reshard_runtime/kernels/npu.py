"""Ascend NPU, by torch_npu's kernels, called as its operator documentation (2.13) says.

No NPU was at hand. The calls are tested against torch_npu's own shape functions, and with stand-ins for the kernels
written from that documentation (`make test-npu`).
"""

from functools import partial

import torch
import torch_npu

from reshard.errors import ShardError
from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard.tensors.tiles import LAST_DIM_LIMIT
from reshard_runtime.kernels.base import Gated, GatedInt8, Kernels, clamped

_FRACTAL_NZ = 29  # torch_npu's number for the format of 16 x 16 (BF16) and 16 x 32 (int8) tiles
_DYNAMIC = 1  # quant_mode of npu_dequant_swiglu_quant
_APPROXIMATE = {GELU: 0, GELU_TANH: 1}  # of npu_geglu


class NpuKernels(Kernels):
    """Shapes: see `reshard_runtime.kernels.base`. Weights are held as [K, N] in FRACTAL_NZ."""

    name = "npu"

    def __init__(self) -> None:
        self._one: dict[torch.device, torch.Tensor] = {}

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        """[K, N], contiguous, FRACTAL_NZ."""
        if weight_NK.dtype == torch.int8 and max(weight_NK.shape) > LAST_DIM_LIMIT:
            raise ShardError(
                f"{name}: {list(weight_NK.shape)}; npu_quant_matmul takes last dims up to {LAST_DIM_LIMIT}: a "
                "larger group narrows all but hidden_size; BF16 has no such limit"
            )
        if weight_NK.dtype == torch.int8 and weight_NK.device not in self._one:
            # npu_quant_matmul wants a scale even where int32 output does not use it; made here, no call makes one.
            self._one[weight_NK.device] = torch.ones(1, dtype=torch.float32, device=weight_NK.device)
        weight_KN = weight_NK.t().contiguous()
        # The cast changes no shape, and is the one kernel of these that torch_npu has no shape function for.
        return weight_KN if weight_KN.is_meta else torch_npu.npu_format_cast(weight_KN, _FRACTAL_NZ)

    def output_scale(self, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """float32 for BF16 output; for FP16 its bits, widened to int64 (what npu_trans_quant_param makes of it)."""
        return scale_N.view(torch.int32).to(torch.int64) if dtype == torch.float16 else scale_N

    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x_TK, weight)

    def gated(self, activation: Activation) -> Gated:
        """npu_swiglu, npu_clipped_swiglu or npu_geglu.

        Of npu_clipped_swiglu, A * sigmoid(alpha * A) * (B + bias) of clamped halves, alpha 1 and bias 0 make silu.
        """
        limit = activation.limit
        if activation.name == SILU and limit is None:
            return torch_npu.npu_swiglu
        if activation.name == SILU and hasattr(torch_npu, "npu_clipped_swiglu"):
            return partial(torch_npu.npu_clipped_swiglu, alpha=1.0, limit=limit, bias=0.0, interleaved=False)
        if activation.name == SILU:
            return lambda h_T2L: torch_npu.npu_swiglu(clamped(h_T2L, limit))
        approximate = _APPROXIMATE[activation.name]
        return lambda h_T2L: torch_npu.npu_geglu(clamped(h_T2L, limit), -1, approximate, True)[0]

    def gated_int8(self, activation: Activation) -> GatedInt8 | None:
        """npu_dequant_swiglu_quant, for silu without a limit.

        Its swiglu_mode 1 has a limit, and takes gate and up from odd and even columns.
        """
        if activation != Activation(SILU):
            return None
        return _dequant_swiglu_quant

    def quantize_dynamic(self, x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_npu.npu_dynamic_quant(x_TK)

    def quantize_static(self, x_TK: torch.Tensor, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_quantize(x_TK, reciprocal, offset, torch.qint8, -1, False)

    def keep_not_finite(self, y_TN: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """Left as `npu_quantize` has it, which vllm-ascend's W8A8 runs too: four kernels more would tell."""
        return y_TN

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch_npu.npu_quant_matmul(q_TK, weight, self._one[q_TK.device], output_dtype=torch.int32)

    def int8_linear(
        self,
        q_TK: torch.Tensor,
        weight: torch.Tensor,
        scale_N: torch.Tensor,
        token_scale_T: torch.Tensor | None,
        bias_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """[T, N] in `dtype`; the kernel rounds to BF16 or FP16, so float32 holds what that gave."""
        half = torch.float16 if scale_N.dtype == torch.int64 else torch.bfloat16
        kernel_dtype = half if dtype == torch.float32 else dtype
        y = torch_npu.npu_quant_matmul(
            q_TK, weight, scale_N, pertoken_scale=token_scale_T, bias=bias_N, output_dtype=kernel_dtype
        )
        return y.to(dtype)


def _dequant_swiglu_quant(
    h_T2L: torch.Tensor, scale_2L: torch.Tensor, token_scale_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, L] int8, [T] float32)."""
    return torch_npu.npu_dequant_swiglu_quant(
        h_T2L,
        weight_scale=scale_2L[None],
        activation_scale=token_scale_T,
        activate_left=True,
        quant_mode=_DYNAMIC,
    )
