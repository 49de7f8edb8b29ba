"""The NPU path with real numbers, on gloo groups of real processes, with stand-ins for the kernels.

It must give what the CPU backend gives: they share no kernel, only the order of the calls.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, load_shard
from reshard_runtime.collectives import PairwiseCollectives
from reshard_runtime.kernels.npu import NpuKernels
from tests.npu.layers import BF16_BOUND, HIDDEN, INTERMEDIATE, Calls, tokens
from tests.npu.stand_ins import FRACTAL_NZ, register
from tests.support.builders import Spec, build
from tests.support.distributed import Ranks
from tests.support.running import split

COUNTS = {1: [6], 2: [5, 3], 4: [5, 0, 1, 7]}


class PairwiseNpuKernels(NpuKernels):
    """With the CPU backend's collectives: partial sums are added in the same order."""

    def collectives(self, group: dist.ProcessGroup) -> PairwiseCollectives:
        return PairwiseCollectives(group)


def _both(
    group: dist.ProcessGroup, shards: Path, kernels: type[NpuKernels], dtype: torch.dtype, options: dict[str, Any]
) -> list[torch.Tensor]:
    kept = register()
    counts = COUNTS[group.size()]
    layer = load_shard(shards, group.rank()).layer(1)
    x_TH = tokens(group.rank(), counts[group.rank()], dtype)
    made = [DenseFFN(layer, group, dtype=dtype, kernels=k, **options) for k in (kernels(), None)]
    result = [ffn(x_TH, tokens_per_rank=counts) for ffn in made]
    del kept
    return result


def _compare(ranks: Callable[[int], Ranks], tmp_path: Path, recipe: str, size: int, **rest: Any) -> list[Any]:
    build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE, computable=True))
    split(tmp_path / "model", tmp_path / "shards", Cut(size))
    dtype = {"fp16": torch.float16, "modelslim_fp16_static": torch.float16}.get(recipe, torch.bfloat16)
    arguments = (tmp_path / "shards", rest.get("kernels", PairwiseNpuKernels), dtype, rest.get("options", {}))
    return ranks(size).run(_both, *arguments)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "recipe", ["modelslim_dynamic", "ct_dynamic", "modelslim_mix", "modelslim_static", "ct_static_asymmetric"]
)
def test_w8a8_is_bit_for_bit_the_cpu_backend_s(
    ranks: Callable[[int], Ranks], tmp_path: Path, recipe: str, size: int
) -> None:
    """Integers are exact, and everything else is done in float32 in the documented order."""
    for npu, cpu in _compare(ranks, tmp_path, recipe, size):
        assert torch.equal(npu, cpu)


def test_fp16_static_with_its_i64_scale(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    for npu, cpu in _compare(ranks, tmp_path, "modelslim_fp16_static", 2):
        assert npu.dtype == torch.float16
        assert torch.equal(npu, cpu)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("recipe", ["bf16", "fp16", "fp8_block"])
def test_plain_weights_are_the_cpu_backend_s_but_for_rounding(
    ranks: Callable[[int], Ranks], tmp_path: Path, recipe: str, size: int
) -> None:
    for npu, cpu in _compare(ranks, tmp_path, recipe, size):
        assert npu.shape == cpu.shape
        if len(cpu):
            assert (npu.double() - cpu.double()).norm() <= BF16_BOUND * cpu.double().norm()


@pytest.mark.parametrize("options", [{}, {"reduce_dtype": torch.float32}, {"max_tokens": 8}], ids=str)
def test_with_the_collectives_that_hccl_has(
    ranks: Callable[[int], Ranks], tmp_path: Path, options: dict[str, Any]
) -> None:
    """all_gather and reduce_scatter as the NPU backend calls them, run by gloo. Of 2 ranks, sums have one order only.

    gloo adds two BF16 partial sums in BF16, once: the same rounding that the CPU backend's float32 sum gets at the end.
    The kernel rounds its sums to BF16 even where they travel in float32.
    """
    for npu, cpu in _compare(ranks, tmp_path, "modelslim_dynamic", 2, kernels=NpuKernels, options=options):
        if "reduce_dtype" in options:
            assert (npu.double() - cpu.double()).norm() <= BF16_BOUND * cpu.double().norm()
        else:
            assert torch.equal(npu, cpu)


def _called(group: dist.ProcessGroup, shards: Path) -> tuple[list[str], list[str], list[tuple[Any, ...]]]:
    kept = register()
    layer = load_shard(shards, group.rank()).layer(0)
    with Calls() as making:
        ffn = DenseFFN(layer, group, kernels=NpuKernels())
    with Calls() as calling:
        ffn(tokens(0, 3, torch.bfloat16))
    del kept
    return making.names, calling.names, making.casts


DYNAMIC = ["npu_dynamic_quant", "gather", "npu_quant_matmul", "npu_dequant_swiglu_quant", "npu_quant_matmul", "scatter"]
STATIC = ["npu_quantize", "gather", "npu_quant_matmul", "npu_swiglu", "npu_quantize", "npu_quant_matmul", "scatter"]


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [("modelslim_dynamic", DYNAMIC), ("modelslim_static", STATIC), ("bf16", ["gather", "npu_swiglu", "scatter"])],
)
def test_the_calls_and_their_order(
    ranks: Callable[[int], Ranks], tmp_path: Path, recipe: str, wanted: list[str]
) -> None:
    """W8A8 dynamic: four kernels and two collectives, whatever the number of ranks."""
    build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE, computable=True))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    for _, names, casts in ranks(2).run(_called, tmp_path / "shards"):
        short = {"c10d::_allgather_base_": "gather", "c10d::_reduce_scatter_base_": "scatter"}
        assert [short.get(name, name.removeprefix("npu::")) for name in names] == wanted
        assert casts == [((HIDDEN, INTERMEDIATE), True, FRACTAL_NZ), ((INTERMEDIATE // 2, HIDDEN), True, FRACTAL_NZ)]
