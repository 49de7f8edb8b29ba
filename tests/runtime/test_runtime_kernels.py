"""The CPU's and CUDA's kernels against plain arithmetic, and the linears that are made of them. All on CPU tensors."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.errors import SchemeError, ShardError, UsageError
from reshard.model.activation import SILU, Activation
from reshard_runtime.kernels.base import Kernels
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.kernels.cuda import CudaKernels
from reshard_runtime.linear import FloatLinear, StaticLinear, make_linear
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import LayerShard, LinearShard

# Tiles of float32, what oneDNN has on this processor, and CUDA's.
BACKENDS: dict[str, Kernels] = {
    "tiles": CpuKernels(onednn=False),
    "processor's": CpuKernels(),
    "cuda's": CudaKernels(),
}
by_backend = pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS)


def _ints(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))


def _floats(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sums(kernels: Kernels, q_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    found = kernels.int8_matmul(q_TK, kernels.weight("w", weight_NK))
    assert found.dtype == torch.int32 or (found.dtype == torch.float32 and found.abs().max() < 2**24)
    return found.to(torch.int32)


@by_backend
@pytest.mark.parametrize("columns", [1, 2, 8, 1023, 1024, 1025, 7168])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17, 33])
def test_int8_products_are_exact(kernels: Kernels, tokens: int, columns: int) -> None:
    if isinstance(kernels, CudaKernels):
        columns = -columns // 8 * -8  # it takes no others
    rng = np.random.default_rng(tokens * columns)
    rows = 40 if isinstance(kernels, CudaKernels) else 37
    q_TK, weight_NK = _ints(rng, tokens, columns), _ints(rng, rows, columns)
    found = _sums(kernels, q_TK, weight_NK)
    assert np.array_equal(found.numpy(), q_TK.numpy().astype(np.int64) @ weight_NK.numpy().astype(np.int64).T)


@by_backend
def test_the_largest_sums_are_exact(kernels: Kernels) -> None:
    """16384 products of (-128)^2 are 2^28, far above the 2^24 up to which float32 adds integers exactly."""
    least = torch.full((8, 16384), -128, dtype=torch.int8)
    assert _sums(kernels, least, least).eq(1 << 28).all()
    least[:, ::2] = 127
    assert _sums(kernels, least, least).eq(8192 * (128 * 128 + 127 * 127)).all()


@by_backend
def test_a_bias_is_added_before_anything_is_rounded(kernels: Kernels) -> None:
    """127 * 127 * 4095 + 1 is no float32, and a bias may take nearly all of it away again."""
    most, bias_N = torch.full((3, 4096), 127, dtype=torch.int8), torch.full((8,), -127 * 127 * 4095, dtype=torch.int32)
    weight = most.repeat(3, 1)[:8]
    most[:, -1], weight[:, -1] = 1, 1
    found = kernels.int8_linear(most, kernels.weight("w", weight), torch.ones(8), None, bias_N, torch.float32)
    assert found.eq(1).all()


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_other_processors_products_are_exact(limit: str) -> None:
    """oneDNN without what they lack. (With AVX2 its int8 products saturate, and are not used.)"""
    program = (
        "import torch; from reshard_runtime.kernels.cpu import CpuKernels; kernels = CpuKernels()\n"
        "q, w = (torch.full((rows, 2047), value, dtype=torch.int8) for rows, value in ((17, 127), (40, -127)))\n"
        "for few in (1, 2, 17): assert kernels.int8_matmul(q[:few], kernels.weight('w', w)).eq(-127 * 127 * 2047).all()"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_packed_weight_is_not_larger() -> None:
    """By oneDNN's own count: 4 bytes a row more, for what it takes away of shifted tokens."""
    for dtype, most in ((torch.bfloat16, 2 * 512 * 1024), (torch.int8, 512 * 1024 + 4 * 512)):
        weight = CpuKernels().weight("w", torch.ones(512, 1024, dtype=dtype))
        assert (torch.ops.mkldnn._nbytes(weight) if weight.is_mkldnn else weight.nbytes) <= most


@pytest.mark.parametrize("kernels", ["tiles", "processor's"])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3000), st.integers(1, 2500), st.integers(0, 9))
def test_parts_of_any_shape(kernels: str, tokens: int, columns: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q_TK, weight_NK = _ints(rng, tokens, columns), _ints(rng, rows, columns)
    found = _sums(BACKENDS[kernels], q_TK, weight_NK)
    assert np.array_equal(found.numpy(), q_TK.numpy().astype(np.int64) @ weight_NK.numpy().astype(np.int64).T)


@by_backend
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_plain_products(kernels: Kernels, tokens: int, dtype: torch.dtype, digits: int) -> None:
    x_TK, weight_NK = _floats(0, tokens, 3000).to(dtype), _floats(1, 700, 3000).to(dtype)
    found = kernels.linear(x_TK, kernels.weight("w", weight_NK))
    wanted = x_TK.double() @ weight_NK.double().t()
    terms = x_TK.double().abs() @ weight_NK.double().abs().t()
    assert found.dtype == dtype
    # Rounded once to the type; before, a float32 sum of 3000 terms is off by far less than 3000 * 2^-24 of them.
    assert ((found.double() - wanted).abs() <= wanted.abs() * 2.0**-digits + terms * 3000 * 2.0**-24).all()


def _quantized(x_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x_TK).max(axis=1) / np.float32(127)
    return np.rint(x_TK / scale[:, None]).astype(np.int8), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dynamic_quantization(dtype: torch.dtype) -> None:
    x_TK = _floats(0, 40, 300).to(dtype)
    q_TK, scale_T = CpuKernels().quantize_dynamic(x_TK)
    wanted, scale = _quantized(x_TK.float().numpy())
    assert np.array_equal(q_TK.numpy(), wanted)
    assert scale_T.numpy().tobytes() == scale.astype(np.float32).tobytes()
    assert q_TK.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_token_of_zeros_has_scale_0(value: float) -> None:
    q_TK, scale_T = CpuKernels().quantize_dynamic(torch.full((1, 8), value).bfloat16())
    assert not q_TK.any()
    assert scale_T.item() == 0.0


def test_the_least_numbers_do_not_overflow() -> None:
    """A subnormal maximum's scale has too few bits: the quotient may be above 127, and is cut there."""
    q_TK, _ = CpuKernels().quantize_dynamic(torch.tensor([[1e-44, -1e-44, 3e-45]]))
    assert q_TK.tolist()[0][0] == -q_TK.tolist()[0][1] <= 127


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_token(poison: float) -> None:
    x_TK = _floats(0, 3, 64).bfloat16()
    clean, clean_scale = CpuKernels().quantize_dynamic(x_TK.clone())
    x_TK[1, 5] = poison
    q_TK, scale_T = CpuKernels().quantize_dynamic(x_TK)
    assert torch.equal(q_TK[[0, 2]], clean[[0, 2]])
    assert torch.equal(scale_T[[0, 2]], clean_scale[[0, 2]])
    y_TN = CpuKernels().int8_linear(
        q_TK, torch.ones(4, 64, dtype=torch.int8), torch.ones(4), scale_T, None, torch.float32
    )
    assert not y_TN[1].isfinite().any()
    assert y_TN[[0, 2]].isfinite().all()


def test_static_quantization() -> None:
    x_TK = torch.tensor([[0.25, 0.75, -0.25, 1.25, 63.0, 64.0, -64.0, -65.0, 900.0, -900.0]])
    found = CpuKernels().quantize_static(x_TK, torch.tensor([2.0]), torch.tensor([0.0]))
    assert found.tolist() == [[0, 2, 0, 2, 126, 127, -128, -128, 127, -128]]  # ties to even, cut at both ends
    found = CpuKernels().quantize_static(x_TK, torch.tensor([2.0]), torch.tensor([1.0]))
    assert found.tolist() == [[2, 2, 0, 4, 127, 127, -127, -128, 127, -128]]  # rounded after the offset is added


@by_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_products(kernels: Kernels, dtype: torch.dtype) -> None:
    """(sums + bias) * scale * token_scale in float32, in this order, rounded once."""
    rng = np.random.default_rng(0)
    q_TK, weight_NK = _ints(rng, 5, 200), _ints(rng, 32, 200)
    bias_N = torch.from_numpy(rng.integers(-(2**20), 2**20, 32, dtype=np.int32))
    scale_N, token_T = _floats(1, 32).abs(), _floats(2, 5).abs()
    sums = (q_TK.numpy().astype(np.int64) @ weight_NK.numpy().astype(np.int64).T).astype(np.int32)
    for bias, token in ((None, None), (bias_N, None), (None, token_T), (bias_N, token_T)):
        wanted = (sums + (0 if bias is None else bias.numpy())).astype(np.float32) * scale_N.numpy()
        wanted = wanted if token is None else wanted * token.numpy()[:, None]
        found = kernels.int8_linear(q_TK, kernels.weight("w", weight_NK), scale_N, token, bias, dtype)
        assert torch.equal(found, torch.from_numpy(wanted).to(dtype))


def test_cuda_s_int8_product_takes_multiples_of_8_and_17_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardError, match=r"a.weight: \[16, 12\]; the int8 product on cuda takes multiples of 8"):
        CudaKernels().weight("a.weight", torch.zeros(16, 12, dtype=torch.int8))
    CudaKernels().weight("a.weight", torch.zeros(16, 12))
    given_rows: list[int] = []
    product = torch._int_mm

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        given_rows.append(len(a))
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    for rows in (1, 16, 17, 40):
        assert (
            len(CudaKernels().int8_matmul(torch.ones(rows, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8)))
            == rows
        )
    assert given_rows == [17, 17, 17, 40]


def _linear(scheme: str, **tensors: Any) -> LinearShard:
    weight = tensors.pop("weight", _ints(np.random.default_rng(0), 12, 24))
    return LinearShard("m", scheme, None, {"weight": weight, **tensors})


STATIC = {
    "input_scale": torch.tensor([0.5]).bfloat16(),
    "input_offset": torch.tensor([-3.0]).bfloat16(),
    "quant_bias": torch.arange(12, dtype=torch.int32),
    "deq_scale": torch.rand(12),
}
ONES = torch.ones(12, 1)


def test_rows_on_the_way() -> None:
    x_TK = _floats(0, 5, 24).bfloat16()
    for linear, width, dtype in (
        (_linear("bf16", weight=torch.ones(12, 24).bfloat16()), 24, torch.bfloat16),
        (_linear("w8a8_dynamic", weight_scale=ONES), 28, torch.int8),
        (_linear("w8a8_static", **STATIC), 24, torch.int8),
    ):
        made = make_linear(linear, CpuKernels(), "dynamic", torch.bfloat16)
        tokens = made.quantize(x_TK)
        rows = made.pack(tokens)
        assert (rows.shape, rows.dtype) == ((5, width), dtype)
        for sent, received in zip(tokens, made.unpack(rows), strict=True):
            assert torch.equal(sent, received)


def test_the_i64_deq_scale_is_the_float32_s_bits() -> None:
    widened = STATIC["deq_scale"].view(torch.int32).to(torch.int64)
    for stored in (STATIC["deq_scale"], widened):
        made = make_linear(
            _linear("w8a8_static", **{**STATIC, "deq_scale": stored}), CpuKernels(), "dynamic", torch.float16
        )
        assert isinstance(made, StaticLinear)
        assert torch.equal(made.scale, STATIC["deq_scale"])


def test_compressed_tensors_zero_point_is_the_plain_formula() -> None:
    """y = scale * weight_scale * sum (q - zero_point) * weight, with q = round(x / scale + zero_point)."""
    scale, zero = torch.tensor([0.5]), torch.tensor([-7], dtype=torch.int8)
    shard = _linear("w8a8_static", weight_scale=torch.rand(12, 1), input_scale=scale, input_zero_point=zero)
    made = make_linear(shard, CpuKernels(), "dynamic", torch.float32)
    x_TK = _floats(0, 5, 24)
    q_TK = torch.clamp(torch.round(x_TK / scale + zero), -128, 127).double() - zero
    wanted = (q_TK @ shard.tensors["weight"].double().t()) * scale.double() * shard.tensors["weight_scale"].double().t()
    torch.testing.assert_close(made.multiply(made.quantize(x_TK), torch.float32).double(), wanted, rtol=1e-6, atol=1e-9)


def test_mix_runs_the_set_that_it_is_told() -> None:
    shard = _linear("w8a8_mix", **STATIC, weight_scale=ONES, weight_offset=ONES * 0)
    kinds = [type(make_linear(shard, CpuKernels(), mix, torch.bfloat16)).__name__ for mix in ("dynamic", "static")]
    assert kinds == ["DynamicLinear", "StaticLinear"]


REFUSED: dict[str, tuple[LinearShard, str]] = {
    "unknown": (_linear("w4a4"), r"m: unknown scheme w4a4; supported are bf16, w8a8_dynamic, "),
    "scheme": (_linear("fp8_block"), r"m: cpu has no kernel for fp8_block"),
    "missing": (
        _linear("w8a8_dynamic"),
        r"m: w8a8_dynamic with weight; expected weight, weight_offset, weight_scale or",
    ),
    "extra": (
        _linear("w8a8_dynamic", weight_scale=ONES, bias=ONES),
        r"m: w8a8_dynamic with bias, weight, ",
    ),
    "type": (_linear("bf16"), r"m.weight is torch.int8, bf16 has BF16 or F16 or F32"),
    "float": (
        _linear("w8a8_dynamic", weight=ONES, weight_scale=ONES),
        r"m.weight is torch.float32, w8a8_dynamic has I8",
    ),
    "scales": (
        _linear("w8a8_dynamic", weight_scale=ONES[:5]),
        r"m.weight_scale is \[5, 1\], expected 12 of them for the weight \[12, 24\]",
    ),
    "two": (
        _linear("w8a8_static", **{**STATIC, "input_scale": torch.ones(2)}),
        r"m.input_scale is \[2\], expected 1 of them",
    ),
    "offset": (
        _linear("w8a8_dynamic", weight_scale=ONES, weight_offset=ONES * -2),
        r"m.weight_offset is not zero \(the largest is 2\); .* symmetrically",
    ),
    "zero scale": (
        _linear("w8a8_static", **{**STATIC, "input_scale": torch.zeros(1)}),
        r"m.input_scale is \[0.0\]",
    ),
    "nan": (
        _linear("w8a8_static", **{**STATIC, "input_scale": torch.tensor([torch.nan])}),
        r"m.input_scale is \[nan\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    shard, message = REFUSED[case]
    with pytest.raises((ShardError, SchemeError), match=message):
        make_linear(shard, CpuKernels(), "dynamic", torch.bfloat16)


def test_weights_are_not_cast() -> None:
    up, down = _linear("bf16", weight=torch.ones(4, 8).bfloat16()), _linear("bf16", weight=torch.ones(8, 2))
    layer = LayerShard(0, 0, 1, 8, 2, 2, "", up, down, Activation(SILU))
    with pytest.raises(UsageError, match=r"dtype is torch.bfloat16, m.weight is torch.float32; weights are not cast"):
        PartialFFN(layer, None, None, "dynamic")
    assert isinstance(make_linear(up, CpuKernels(), "dynamic", torch.bfloat16), FloatLinear)


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    """Where float32 products of tiles stand in for int8's: 127 * 127 * 4095 is odd and beyond 2^24."""
    q_TK, weight_NK = torch.full((3, 4095), 127, dtype=torch.int8), torch.full((8, 4095), 127, dtype=torch.int8)
    sums_TN = CpuKernels(onednn=False).int8_matmul(q_TK, weight_NK)
    assert sums_TN.unique().tolist() == [127 * 127 * 4095]
