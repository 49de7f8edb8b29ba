"""Every activation by torch_npu's kernels, with stand-ins for them, against the CPU backend's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_npu

from reshard.model.activation import SILU, Activation
from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, load_shard
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.kernels.npu import NpuKernels
from tests.npu.layers import BF16_BOUND, HIDDEN, INTERMEDIATE, Calls, tokens
from tests.npu.stand_ins import register
from tests.support.activations import CASES, LIMIT, Case
from tests.support.builders import Spec, build
from tests.support.running import split

by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    kept = register()
    yield
    del kept


def _h() -> torch.Tensor:
    return torch.randn(7, 128, generator=torch.Generator().manual_seed(0)) * 3


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_the_formula(case: Case, dtype: torch.dtype) -> None:
    h = _h().to(dtype)
    found = NpuKernels().gated(case.activation)(h.clone())
    wanted = CpuKernels().gated(case.activation)(h.clone())
    assert found.dtype == dtype
    # The same function of the same values in float32: a unit in the last place where it falls between two.
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_a_torch_npu_without_the_clipped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = NpuKernels().gated(LIMITED)(_h())
    monkeypatch.delattr(torch_npu, "npu_clipped_swiglu")
    torch.testing.assert_close(NpuKernels().gated(LIMITED)(_h()), wanted)


@by_case
def test_only_plain_silu_is_fused_with_the_quantization(case: Case) -> None:
    """npu_dequant_swiglu_quant's own limit goes with gate and up from odd and even columns."""
    assert (NpuKernels().gated_int8(case.activation) is not None) == (case.activation == PLAIN)


QUANTIZE = {"modelslim_dynamic": "npu_dynamic_quant", "modelslim_static": "npu_quantize"}
PLAIN, LIMITED = Activation(SILU), Activation(SILU, LIMIT)


def _wanted_calls(activation: Activation, recipe: str) -> list[str]:
    kernel = {PLAIN: "npu_swiglu", LIMITED: "npu_clipped_swiglu"}.get(activation, "npu_geglu")
    if recipe == "bf16":
        return [kernel]
    between = [kernel, QUANTIZE[recipe]]
    if recipe == "modelslim_dynamic" and activation == PLAIN:
        between = ["npu_dequant_swiglu_quant"]
    return [QUANTIZE[recipe], "npu_quant_matmul", *between, "npu_quant_matmul"]


@by_case
@pytest.mark.parametrize("recipe", ["bf16", *QUANTIZE])
def test_a_layer(tmp_path: Path, case: Case, recipe: str) -> None:
    dense = {"mlp_layer_types": ["dense", "dense", "sparse"]} if "swiglu_limit" in case.config else {}
    build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE, computable=True, config=case.config | dense))
    split(tmp_path / "model", tmp_path / "shards", Cut(1))
    layer, x_TH = load_shard(tmp_path / "shards", 0).layer(0), tokens(0, 9, torch.bfloat16)
    assert layer.activation == case.activation
    ffn = DenseFFN(layer, kernels=NpuKernels())
    with Calls() as calls:
        found = ffn(x_TH)
    wanted = DenseFFN(layer)(x_TH)
    # Of W8A8 dynamic, all but plain silu rounds gate and up to BF16 before h is quantized: some h are a step away.
    bound = 0.02 if recipe == "modelslim_dynamic" and case.activation != PLAIN else BF16_BOUND
    assert (found.double() - wanted.double()).norm() <= bound * wanted.double().norm()
    assert [name.removeprefix("npu::") for name in calls.names] == _wanted_calls(case.activation, recipe)
