"""The plugin in vLLM's own workers, without a server: what is built, what is loaded, what a split layer computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed import Ranks
from tests.vllm.inside import Served, forward, parameters, tokens

GetRanks = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def two(ranks: GetRanks) -> Ranks:
    return ranks(2)


def _dense(name: str, layers: int) -> bool:
    return any(name.startswith(f"model.layers.{i}.mlp.{p}_proj.") for i in range(layers) for p in ("gate_up", "down"))


def test_only_the_dense_layers_change(two: Ranks, mixed: Path) -> None:
    whole = two.run(parameters, Served(mixed, data=2))
    ours = two.run(parameters, Served(mixed, mixed.parent / "tp2", data=2, option=2))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        split = {name for name in before if _dense(name, 2)}
        assert len(split) == 4
        assert any(".experts." in name for name in before)
        assert any(".shared_experts." in name for name in before)
        for name in before.keys() - split:
            assert torch.equal(before[name], after[name]), name
    for name in sorted(split):
        full = whole[0][name]
        if "gate_up" in name:
            gate, up = full.chunk(2)
            parts = [torch.cat(halves) for halves in zip(gate.chunk(2), up.chunk(2), strict=True)]
        else:
            parts = list(full.chunk(2, dim=1))
        for part, after in zip(parts, ours, strict=True):
            assert torch.equal(part, after[name]), name


def test_what_a_split_layer_computes(two: Ranks, dense: Path) -> None:
    counts = [[5, 40], [64, 1], [1, 2], [7, 7]]
    whole = two.run(forward, Served(dense, data=2), counts)
    ours = two.run(forward, Served(dense, dense.parent / "tp2", data=2, option=2), counts)
    for rank, (before, after) in enumerate(zip(whole, ours, strict=True)):
        for each, unsplit, got in zip(counts, before, after, strict=True):
            for a, b in zip(unsplit, got, strict=True):
                assert b.shape == (each[rank], 256)
                # float32 sums of 512 products in another order; the values are of size 1.
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)
                assert a.abs().max() > 0.5
    assert tokens(0, 1).shape == (1, 256)
