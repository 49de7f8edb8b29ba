"""The split layer against Hugging Face transformers' own, unsplit: float32, BF16, W8A8, on groups of up to 8."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, collectives, load_shard
from reshard_runtime.collectives import Collectives, PairwiseCollectives, reduce_dtype_for
from tests.support.builders import Spec, build
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.support.unsplit import (
    TensorCpuKernels,
    Weights,
    error,
    exact,
    part,
    relative,
    split_outputs,
    unsplit_mlp,
    whole_layer,
)

HIDDEN, INTERMEDIATE, TOKENS = 512, 2048, 64
PAIRWISE = {"default": (True, None), "FP32": (True, torch.float32)}
IN_BF16 = "BF16 added in BF16"
COLLECTIVE = {IN_BF16: (False, torch.bfloat16), "FP32 added in FP32": (False, torch.float32)}
ALLOWED = 1.5  # times the unsplit BF16 layer's own error


def _tokens(dtype: torch.dtype) -> torch.Tensor:
    x_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    x_TH[3] = 0
    x_TH[5, 7] = 200  # an outlier channel
    return x_TH.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_bf16_is_as_exact_as_the_unsplit_layer(ranks: Callable[[int], Ranks], size: int) -> None:
    mlp, x_TH = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.bfloat16), _tokens(torch.bfloat16)
    reference = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.bfloat16).double()(x_TH.double())
    own = error(mlp(x_TH), reference)
    assert own > 0
    if size == 1:
        outputs = {"alone": DenseFFN(part(mlp.state_dict(), 0, 1))(x_TH)}
    else:
        by_rank = ranks(size).run(split_outputs, mlp.state_dict(), x_TH, PAIRWISE | COLLECTIVE)
        outputs = {name: torch.cat([output[name] for output in by_rank]) for name in by_rank[0]}
    for name, y_TH in outputs.items():
        assert y_TH.dtype == torch.bfloat16
        assert error(y_TH, reference) <= ALLOWED * own, name
        if name != IN_BF16:  # added in BF16 at R = 8, the largest single error is 1.9 times the unsplit layer's
            largest = relative(mlp(x_TH), reference).abs().max()
            assert relative(y_TH, reference).abs().max() <= ALLOWED * largest, name
        assert not y_TH[3].any()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_float32_differs_by_the_order_of_sums_only(ranks: Callable[[int], Ranks], size: int) -> None:
    mlp, x_TH = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.float32), _tokens(torch.float32)
    by_rank = ranks(size).run(split_outputs, mlp.state_dict(), x_TH, PAIRWISE)
    reference = unsplit_mlp(HIDDEN, INTERMEDIATE, torch.float32).double()(x_TH.double())
    # A float32 sum of n terms in any order is off by n/2 roundings of its terms at the most, sqrt(n) typically: 2^-24
    # times sqrt(2048) of what is added up is 3e-6.
    assert error(torch.cat([output["default"] for output in by_rank]), reference) <= 3e-6


def _w8a8(group: dist.ProcessGroup, shards: Path, x_TH: torch.Tensor) -> torch.Tensor:
    return DenseFFN(load_shard(shards, group.rank()).layer(0), group)(x_TH.chunk(group.size())[group.rank()])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_w8a8_dynamic_is_no_further_from_its_weights_than_unsplit(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int
) -> None:
    """h is quantized over each rank's columns: its scale is the largest of fewer values, so steps are no larger."""
    build(tmp_path / "model", Spec("modelslim_dynamic", HIDDEN, INTERMEDIATE, computable=True))
    split(tmp_path / "model", tmp_path / "shards", Cut(size))
    x_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    reference = exact(tmp_path / "model", x_TH)
    alone = error(DenseFFN(whole_layer(tmp_path / "model"))(x_TH), reference)
    together = error(torch.cat(ranks(size).run(_w8a8, tmp_path / "shards", x_TH)), reference)
    # int8 steps of max/127, max about 3.5 of a token's typical value and 8 of h's: off by a step / sqrt(12).
    assert alone <= 0.03
    assert together <= 1.02 * alone  # BF16's roundings of the partial sums are far below the steps


@pytest.mark.parametrize(("size", "by_collective"), [(1, torch.bfloat16), (8, torch.bfloat16), (9, torch.float32)])
def test_the_default_type_of_partial_sums(size: int, by_collective: torch.dtype) -> None:
    """BF16 wherever that keeps the bound; 9 ranks are the first above it, and gloo's are added in float32."""
    for kind, wanted in ((PairwiseCollectives, torch.bfloat16), (Collectives, by_collective)):
        assert reduce_dtype_for(object.__new__(kind), size, torch.bfloat16) == wanted


def _chosen(group: dist.ProcessGroup, weights: Weights, most: int) -> list[torch.dtype]:
    layer = part(weights, group.rank(), group.size())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "RANKS_IN_OWN_TYPE", most)
        return [DenseFFN(layer, group, kernels=kernels).reduce_dtype for kernels in (None, TensorCpuKernels())]


@pytest.mark.parametrize(("most", "by_collective"), [(2, torch.bfloat16), (1, torch.float32)])
def test_the_layer_takes_the_default_type(ranks: Callable[[int], Ranks], most: int, by_collective: torch.dtype) -> None:
    for found in ranks(2).run(_chosen, unsplit_mlp(64, 128, torch.bfloat16).state_dict(), most):
        assert found == [torch.bfloat16, by_collective]
