"""The option over data- and tensor-parallel ranks together: 2 x 2 processes in vLLM's own workers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reshard.plan.pipeline import Cut
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import HIDDEN, INTERMEDIATE

COUNTS = [[5, 5, 40, 40], [64, 64, 1, 1], [7, 7, 7, 7], [0, 0, 3, 3]]
GATE_UP, DOWN = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def four(ranks: Callable[[int], Ranks]) -> Ranks:
    return ranks(4)


def _served(model: Path, size: int, **more: object) -> Served:
    return Served(model, model.parent / f"tp{size}", data=2, tensor=2, option=size, **more)  # type: ignore[arg-type]


def test_the_four_share_each_layer(four: Ranks, dense: Path) -> None:
    """A rank's place is that of its data-parallel rank, then that of its tensor-parallel rank."""
    whole = four.run(inside.parameters, Served(dense, data=2, tensor=2))
    ours = four.run(inside.parameters, _served(dense, 4))
    halves = [torch.cat([whole[rank][GATE_UP].chunk(2)[half] for rank in (0, 1)]) for half in (0, 1)]
    down = torch.cat([whole[rank][DOWN] for rank in (0, 1)], dim=1)
    for place, held in enumerate(ours):
        rows = slice(place * INTERMEDIATE // 4, (place + 1) * INTERMEDIATE // 4)
        assert torch.equal(held[GATE_UP], torch.cat([half[rows] for half in halves]))
        assert torch.equal(held[DOWN], down[:, rows])
        for name in held.keys() - {name for name in held if ".mlp." in name}:
            assert torch.equal(held[name], whole[place][name]), name


def test_what_they_compute(four: Ranks, dense: Path) -> None:
    whole = four.run(inside.forward, Served(dense, data=2, tensor=2), COUNTS)
    ours = four.run(inside.forward, _served(dense, 4), COUNTS)
    for rank, (before, after) in enumerate(zip(whole, ours, strict=True)):
        for counts, unsplit, got in zip(COUNTS, before, after, strict=True):
            assert len(got) == 3
            for a, b in zip(unsplit, got, strict=True):
                assert b.shape == (counts[rank], HIDDEN)
                # float32 sums of 512 products of size 10, in another order
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
    for pair in (0, 2):  # tensor-parallel ranks go on with the same hidden states
        for a, b in zip(ours[pair][0], ours[pair + 1][0], strict=True):
            assert torch.equal(a, b)
            assert a.abs().max() > 0.5


def test_the_tensor_parallel_size_is_what_the_engine_cuts(four: Ranks, dense: Path) -> None:
    whole = four.run(inside.parameters, Served(dense, data=2, tensor=2))
    ours = four.run(inside.parameters, _served(dense, 2))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1, "is 1; with data-parallel size 2 and tensor-parallel size 2 it may be 2 or 4"),
        (8, "is 8; with data-parallel size 2 and tensor-parallel size 2 it may be 2 or 4"),
        (2, "is 2, the shard set is cut for 4: set it to 4, or cut it with reshard split --tp 2"),
    ],
)
def test_other_sizes(four: Ranks, dense: Path, size: int, said: str) -> None:
    served = Served(dense, dense.parent / "tp4", data=2, tensor=2, option=size)
    for each in four.run(inside.load, served):
        assert f"denseffn_tensor_parallel_size {said}" in each


def test_one_ranks_missing_shard_stops_all_four(four: Ranks, dense: Path, tmp_path: Path) -> None:
    shards = tmp_path / "tp4"
    split(dense, shards, Cut(4))
    missing = shards / "denseffn-rank-00003-of-00004.safetensors"
    missing.unlink()
    for said in four.run(inside.load, Served(dense, shards, data=2, tensor=2, option=4)):
        assert str(missing) in said
