"""The whole forward on the meta device at R1's size: torch_npu's own shape functions accept or refuse every call."""

from typing import Literal

import pytest
import torch
import torch_npu

from reshard.errors import ShardError
from reshard.model.activation import SILU, Activation
from reshard_runtime.kernels import device_of, kernels_for
from reshard_runtime.kernels.npu import NpuKernels
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import LayerShard, LinearShard
from tests.support.activations import CASES, Case

H, I = 7168, 18432  # noqa: E741 - the field's name
SCHEMES = {
    "bf16": {"weight": torch.bfloat16},
    "fp16": {"weight": torch.float16},
    "w8a8_dynamic": {"weight": torch.int8, "weight_scale": torch.float32, "weight_offset": torch.float32},
    "w8a8_static": {
        "weight": torch.int8,
        "input_scale": torch.bfloat16,
        "input_offset": torch.bfloat16,
        "quant_bias": torch.int32,
        "deq_scale": torch.float32,
    },
    "w8a8_mix": {
        "weight": torch.int8,
        "input_scale": torch.bfloat16,
        "input_offset": torch.bfloat16,
        "quant_bias": torch.int32,
        "deq_scale": torch.float32,
        "weight_scale": torch.float32,
        "weight_offset": torch.float32,
    },
}

SILU_ALONE = Activation(SILU)


def _linear(scheme: str, name: str, out: int, in_: int) -> LinearShard:
    shapes: dict[str, tuple[int, ...]] = {"weight": (out, in_), "weight_scale": (out, 1), "weight_offset": (out, 1)}
    shapes |= {"input_scale": (1,), "input_offset": (1,), "quant_bias": (out,), "deq_scale": (out,)}
    tensors = {s: torch.empty(shapes[s], dtype=t, device="meta") for s, t in SCHEMES[scheme].items()}
    return LinearShard(name, "bf16" if scheme == "fp16" else scheme, None, tensors)


def _layer(
    scheme: str,
    tp_size: int,
    *,
    hidden: int = H,
    down_in: int | None = None,
    down: str | None = None,
    activation: Activation | None = SILU_ALONE,
) -> LayerShard:
    share = I // tp_size
    gate_up = _linear(scheme, "gate_up_proj", 2 * share, hidden)
    down_proj = _linear(down or scheme, "down_proj", hidden, down_in or share)
    return LayerShard(0, 0, tp_size, hidden, I, share, "", gate_up, down_proj, activation)


@pytest.mark.parametrize("tokens", [1, 24, 8192])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_call_is_accepted(scheme: str, tp_size: int, tokens: int) -> None:
    ffn = PartialFFN(_layer(scheme, tp_size), NpuKernels(), None, "dynamic")
    rows = ffn.pack(torch.empty(tokens, H, dtype=ffn.dtype, device="meta"))
    width = {"w8a8_dynamic": H + 4, "w8a8_mix": H + 4, "w8a8_static": H}.get(scheme, H)
    assert (rows.shape, rows.dtype.itemsize) == ((tokens, width), 1 if "w8a8" in scheme else 2)
    for dtype in (ffn.dtype, torch.float32):
        partial = ffn.forward_packed(rows.repeat(tp_size, 1), dtype)
        assert (partial.shape, partial.dtype, partial.is_meta) == ((tokens * tp_size, H), dtype, True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_activation_is_accepted(scheme: str, case: Case) -> None:
    ffn = PartialFFN(_layer(scheme, 8, activation=case.activation), NpuKernels(), None, "dynamic")
    rows = ffn.pack(torch.empty(24, H, dtype=ffn.dtype, device="meta"))
    assert ffn.forward_packed(rows, ffn.dtype).shape == (24, H)


@pytest.mark.parametrize("activation", [None, Activation("situ")])
def test_an_activation_that_is_not_known_is_refused(activation: Activation | None) -> None:
    with pytest.raises(ShardError, match="layer 0: its activation is "):
        PartialFFN(_layer("bf16", 8, activation=activation), NpuKernels(), None, "dynamic")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["dynamic", "static"])
@pytest.mark.parametrize("scheme", ["w8a8_mix", "w8a8_static", "w8a8_dynamic"])
def test_w8a8_runs_in_either_type(scheme: str, mix: Literal["dynamic", "static"], dtype: torch.dtype) -> None:
    ffn = PartialFFN(_layer(scheme, 8), NpuKernels(), dtype, mix)
    assert ffn.forward_local(torch.empty(5, H, dtype=dtype, device="meta"), dtype).shape == (5, H)


def test_quantized_gate_and_up_with_a_plain_down() -> None:
    ffn = PartialFFN(_layer("w8a8_dynamic", 8, down="bf16"), NpuKernels(), None, "dynamic")
    assert ffn.forward_local(torch.empty(5, H, dtype=torch.bfloat16, device="meta"), torch.bfloat16).shape == (5, H)


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8_static"])
def test_a_wrong_share_is_refused_by_torch_npu(scheme: str) -> None:
    ffn = PartialFFN(_layer(scheme, 8, down_in=I // 8 - 32), NpuKernels(), None, "dynamic")
    with pytest.raises(RuntimeError, match="k dim of x1 and x2 need be same"):
        ffn.forward_local(torch.empty(3, H, dtype=torch.bfloat16, device="meta"), torch.bfloat16)


def test_a_wrong_hidden_size_is_refused_by_torch_npu() -> None:
    ffn = PartialFFN(_layer("w8a8_dynamic", 8), NpuKernels(), None, "dynamic")
    with pytest.raises(RuntimeError, match="k dim of x1 and x2 need be same"):
        ffn.forward_local(torch.empty(3, H + 32, dtype=torch.bfloat16, device="meta"), torch.bfloat16)


def test_a_last_dim_above_the_kernel_s_is_refused_by_name() -> None:
    with pytest.raises(ShardError, match=r"gate_up_proj.weight: \[36864, 70000\]; npu_quant_matmul takes .* 65535"):
        PartialFFN(_layer("w8a8_dynamic", 1, hidden=70_000), NpuKernels(), None, "dynamic")


def test_the_device_s_name_chooses_these_kernels() -> None:
    assert isinstance(kernels_for(device_of("npu:3")), NpuKernels)
    assert torch_npu.__version__.startswith("2.13.0")
