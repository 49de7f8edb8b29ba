"""Stand-ins for eight of torch_npu's kernels, on CPU tensors, written from the operator documentation in its wheel.

No NPU was at hand. What they prove: that the NPU path calls these kernels with arguments that the documentation allows,
in the right order, and that its result is right if the kernels do what is written there. What they do not prove:
that a device's kernels do, nor anything of speed.

They are stricter than torch_npu's shape functions where the documentation is: types and their combinations, last dims
of at most 65535, no empty operand.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom

ND, FRACTAL_NZ = 2, 29
_QINT8 = 12  # c10::ScalarType::QInt8, what a dtype becomes where the operator's schema has an int
_INT8_MAX, _INT8_MIN = 127, -128
_DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
_LAST_DIM_LIMIT = 65_535


def register() -> list[torch.library.Library]:
    """Put the stand-ins in. They stay as long as the libraries that are returned."""
    cpu = torch.library.Library("npu", "IMPL", "CPU")
    for kernel in (
        npu_dynamic_quant,
        npu_quant_matmul,
        npu_dequant_swiglu_quant,
        npu_swiglu,
        npu_clipped_swiglu,
        npu_geglu,
        npu_quantize,
        npu_format_cast,
    ):
        cpu.impl(kernel.__name__, kernel)
    return [cpu]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _quantize(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scale = rowMax(abs(x)) / 127, y = round(x / scale), as documented; a row of zeros is taken to give zeros."""
    scale = value.abs().amax(-1) / _INT8_MAX
    scaled = torch.where(scale[..., None] > 0, value / scale[..., None], torch.zeros_like(value))
    return scaled.round().clamp(_INT8_MIN, _INT8_MAX).to(torch.int8), scale


def npu_dynamic_quant(
    x: torch.Tensor,
    *,
    smooth_scales: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token, symmetric: ([..., K] int8, [...] float32)."""
    _require(x.dtype in (torch.float16, torch.bfloat16), f"npu_dynamic_quant: x is {x.dtype}")
    _require(x.dim() > 1, "npu_dynamic_quant: x must have more than one dim")
    _require(
        smooth_scales is None and group_index is None and dst_type in (None, 1), "npu_dynamic_quant: not used here"
    )
    return _quantize(x.float())


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] x [K, N] int8: (sums + bias) * scale [* pertoken_scale]; the table of types is the documentation's."""
    out = _DTYPES[1 if output_dtype is None else output_dtype]
    _require(x1.dtype == x2.dtype == torch.int8, f"npu_quant_matmul: x1 is {x1.dtype}, x2 {x2.dtype}")
    _require(x1.numel() > 0 and x2.numel() > 0 and scale.numel() > 0, "npu_quant_matmul: an operand is empty")
    _require(x1.is_contiguous(), "npu_quant_matmul: x1 is not contiguous")
    _require(max(x1.shape[-1], x2.shape[-1]) <= _LAST_DIM_LIMIT, "npu_quant_matmul: a last dim is above 65535")
    _require(x1.shape[-1] == x2.shape[0], f"npu_quant_matmul: k is {x1.shape[-1]} and {x2.shape[0]}")
    n = x2.shape[1]
    _require(scale.dim() == 1 and len(scale) in (1, n), f"npu_quant_matmul: scale is {list(scale.shape)}, n is {n}")
    per_token = pertoken_scale is not None
    allowed = {
        (torch.float16, False): ({torch.int64, torch.float32}, {torch.int32}),
        (torch.bfloat16, False): ({torch.float32, torch.bfloat16}, {torch.int32, torch.bfloat16, torch.float32}),
        (torch.bfloat16, True): ({torch.float32, torch.bfloat16}, {torch.int32, torch.bfloat16, torch.float32}),
        (torch.float16, True): ({torch.float32}, {torch.int32, torch.float16, torch.float32}),
        (torch.int32, False): ({torch.float32, torch.bfloat16}, {torch.int32}),
    }
    _require((out, per_token) in allowed, f"npu_quant_matmul: {out} with pertoken_scale {per_token}")
    scales, biases = allowed[out, per_token]
    _require(scale.dtype in scales, f"npu_quant_matmul: scale is {scale.dtype} for {out}")
    _require(bias is None or (bias.dtype in biases and bias.shape == (n,)), "npu_quant_matmul: bias")
    _require(offset is None and group_sizes is None and y_scale is None, "npu_quant_matmul: not used here")
    if pertoken_scale is not None:
        _require(pertoken_scale.dtype == torch.float32, f"npu_quant_matmul: pertoken_scale is {pertoken_scale.dtype}")
        _require(
            pertoken_scale.shape == (len(x1),), f"npu_quant_matmul: pertoken_scale is {list(pertoken_scale.shape)}"
        )
    sums = (x1.double() @ x2.double()).to(torch.int64)  # exact: far below 2^53
    if bias is not None:
        _require(bias.dtype == torch.int32, "npu_quant_matmul: a float bias is added after scaling, not done here")
        sums = sums + bias
    if out == torch.int32:
        return sums.to(torch.int32)
    if scale.dtype == torch.int64:  # what npu_trans_quant_param makes: the float32's bits
        scale = scale.to(torch.int32).view(torch.float32)
    y = sums.float() * scale.float()
    return (y if pertoken_scale is None else y * pertoken_scale[:, None]).to(out)


def npu_dequant_swiglu_quant(
    x: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    activation_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 2L] int32 -> float32 by both scales -> swish of one half times the other -> ([T, L] int8, [T] float32)."""
    _require(x.dim() == 2 and x.shape[1] % 2 == 0, f"npu_dequant_swiglu_quant: x is {list(x.shape)}")
    _require(x.dtype == torch.int32, f"npu_dequant_swiglu_quant: x is {x.dtype}, only int32 is used here")
    if weight_scale is None or activation_scale is None:
        raise ValueError("npu_dequant_swiglu_quant: int32 wants scales")
    _require(
        weight_scale.dtype == torch.float32 and weight_scale.shape == (1, x.shape[1]),
        f"npu_dequant_swiglu_quant: weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}",
    )
    _require(
        activation_scale.dtype == torch.float32 and activation_scale.shape == (len(x),),
        f"npu_dequant_swiglu_quant: activation_scale is {activation_scale.dtype} {list(activation_scale.shape)}",
    )
    others = (bias, quant_scale, quant_offset, group_index)
    _require(
        all(o is None for o in others) and quant_mode == 1 and swiglu_mode == 0, "npu_dequant_swiglu_quant: not used"
    )
    left, right = (x.float() * weight_scale * activation_scale[:, None]).chunk(2, -1)
    return _quantize(F.silu(left) * right if activate_left else F.silu(right) * left)


def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """swish(A) * B of x's two halves."""
    _require(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"npu_swiglu: x is {x.dtype}")
    left, right = x.float().chunk(2, dim)
    return (F.silu(left) * right).to(x.dtype)


def npu_clipped_swiglu(
    x: torch.Tensor,
    *,
    group_index: torch.Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> torch.Tensor:
    """A * sigmoid(alpha * A) * (B + bias) of A clamped to at most the limit and B to within it."""
    _require(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"npu_clipped_swiglu: x is {x.dtype}")
    _require(x.is_contiguous(), "npu_clipped_swiglu: x is not contiguous")
    _require(x.dim() > 1 and x.shape[dim] % 2 == 0, f"npu_clipped_swiglu: x is {list(x.shape)}")
    _require(group_index is None and not interleaved, "npu_clipped_swiglu: groups and odd and even are not used here")
    left, right = x.float().chunk(2, dim)
    left, right = left.clamp(max=limit), right.clamp(-limit, limit)
    return (left * torch.sigmoid(alpha * left) * (right + bias)).to(x.dtype)


def npu_geglu(
    x: torch.Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gelu of one half times the other, that gelu); approximate: 0 by erf, 1 by tanh."""
    _require(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"npu_geglu: x is {x.dtype}")
    _require(approximate in (0, 1), f"npu_geglu: approximate is {approximate}")
    left, right = x.float().chunk(2, dim)
    gate, up = (left, right) if activate_left else (right, left)
    gelu = F.gelu(gate, approximate=("none", "tanh")[approximate])
    return (gelu * up).to(x.dtype), gelu.to(x.dtype)


def npu_quantize(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, dtype: int, axis: int = 1, div_mode: bool = True
) -> torch.Tensor:
    """div_mode False: x * scales + zero_points, rounded."""
    _require(dtype == _QINT8 and not div_mode and axis == -1, "npu_quantize: only qint8 by multiplication is used here")
    _require(x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"npu_quantize: x is {x.dtype}")
    _require(scales.dtype in (torch.float32, x.dtype), f"npu_quantize: x is {x.dtype}, scales {scales.dtype}")
    _require(
        zero_points.dtype == scales.dtype and zero_points.shape == scales.shape,
        "npu_quantize: zero_points must have the type and shape of scales",
    )
    _require(scales.dim() == 1 and len(scales) in (1, x.shape[-1]), f"npu_quantize: scales {list(scales.shape)}")
    value = x.float() * scales.float() + zero_points.float()
    return value.round().clamp(_INT8_MIN, _INT8_MAX).to(torch.int8)


def npu_format_cast(
    x: torch.Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> torch.Tensor:
    """Another layout of the same values; the layout is the device's own affair."""
    _require(acl_format in (ND, FRACTAL_NZ), f"npu_format_cast: format {acl_format}")
    _require(x.is_contiguous(), "npu_format_cast: the weight is not contiguous")
    return x.clone()
