"""Decode nodes of a disaggregated deployment, where vllm-ascend does not exchange token counts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ascend import inside, steps
from tests.ascend.inside import DECODE_NODE, Served
from tests.ascend.models import Model, close
from tests.support.distributed import RankFailure, Ranks
from tests.vllm.models import HIDDEN

MOST = 24  # max_num_seqs: without graphs, what a decode step may have
ENGINE = {**DECODE_NODE, "max_num_seqs": MOST}
# What decode nodes of large deployments set, where vllm-ascend's versions want it.
RECOMPUTE = {"recompute_scheduler_enable": True, "scheduler_config": {"recompute_scheduler_enable": True}}


def _node(model: Path, shards: Path | None, **more: object) -> Served:
    """Four data-parallel ranks of a decode node."""
    settings = {"data": 4, "atlas": "A3", "engine": ENGINE, "additional": RECOMPUTE, **more}
    return Served(model, shards, **settings)  # type: ignore[arg-type]


def test_the_engine_exchanges_no_counts(four: Ranks, dense: Path) -> None:
    """That what follows is of such a node: vllm-ascend says so itself."""
    assert four.run(inside.exchanges_counts, _node(dense, None)) == [False] * 4
    assert four.run(inside.exchanges_counts, Served(dense, data=4)) == [True] * 4


def test_200_steps_of_any_counts_in_any_buckets(four: Ranks, dense: Path) -> None:
    """Two groups of two. Each rank has its own order of counts: none waits, every result is right."""
    ours = four.run(steps.decode, _node(dense, dense.parent / "tp2", option=2), 200, MOST)
    buckets = (0, *steps.BUCKETS)
    whole = four.run(inside.forward, _node(dense, None), [[bucket] * 4 for bucket in buckets])
    for unsplit, found in zip(whole, ours, strict=True):
        assert found["different"] == []
        assert found["results"].keys() == set(buckets)
        for bucket, before in zip(buckets, unsplit, strict=True):
            for a, b in zip(before, found["results"][bucket], strict=True):
                close(b, a)
        assert found["sent"] == {(MOST, MOST * HIDDEN * 2)}
        assert sorted(name for name, *_ in found["addresses"]) == ["gather", "reduce_scatter"]  # each at one place


def test_max_tokens_is_the_number_of_rows(four: Ranks, dense: Path) -> None:
    found = four.run(steps.decode, _node(dense, dense.parent / "tp2", option=2, extra={"max_tokens": 31}), 5, MOST)
    assert [each["sent"] for each in found] == [{(31, 31 * HIDDEN * 2)}] * 4


def test_ranks_that_were_told_different_numbers(four: Ranks, dense: Path) -> None:
    served = [_node(dense, dense.parent / "tp2", option=2, extra={"max_tokens": rows}) for rows in (24, 24, 24, 32)]
    for said in four.run(steps.load_each, served):
        assert "max_tokens is 24 on rank 0 of the group and 32 on rank 3" in said


def test_memory_profiling_and_warm_up_may_have_more(four: Ranks, dense: Path) -> None:
    """vllm-ascend runs them with max_num_batched_tokens, the same on every rank."""
    ours = four.run(steps.rehearse, _node(dense, dense.parent / "tp2", option=2), MOST + 40)
    whole = four.run(inside.forward, _node(dense, None), [[MOST + 40] * 4])
    for (unsplit,), (found, sent) in zip(whole, ours, strict=True):
        assert sent == {(MOST + 40, (MOST + 40) * HIDDEN * 2)}
        for a, b in zip(unsplit, found, strict=True):
            close(b, a)


def test_prefill_that_is_not_exchanged_either(four: Ranks, dense: Path) -> None:
    """Without the recompute scheduler, where vllm-ascend's experts take a whole prefill (fused MC2)."""
    fused = {"enable_fused_mc2": 1}
    served = _node(dense, dense.parent / "tp2", option=2, additional=fused)
    if four.run(inside.exchanges_counts, served)[0]:
        pytest.skip("this vllm-ascend does not know enable_fused_mc2 in its additional config")
    for said in four.run(inside.load, served):
        assert f"every rank would send {MOST} rows, and a step may have" in said
        assert "recompute_scheduler_enable" in said


@pytest.mark.parametrize("wrong", [0, 1])
def test_more_tokens_than_rows_end_the_group(four: Ranks, dense: Path, tmp_path: Path, wrong: int) -> None:
    """The rank at fault raises before any collective; the other of its group ends with what that has said."""
    said = tmp_path / "said"
    with pytest.raises(RankFailure) as caught:
        four.run(steps.too_many, _node(dense, dense.parent / "tp2", option=2), wrong, MOST + 1, said)
    message = f"model.layers.0.mlp: x has {MOST + 1} tokens, and every rank sends {MOST} rows; set max_tokens in"
    assert said.read_text().startswith(f"TokensError: {message}")
    other = wrong ^ 1
    assert caught.value.kinds == {wrong: "EOFError", other: "GroupError"}
    assert f"rank {wrong % 2} of the group failed: {message}" in str(caught.value)


def test_data_and_tensor_parallel_ranks_together(four: Ranks, dense: Path) -> None:
    node = {"data": 2, "tensor": 2}
    counts = [[0, 7], [24, 1], [8, 8]]
    whole = four.run(inside.forward, _node(dense, None, **node), counts)
    ours = four.run(inside.forward, _node(dense, dense.parent / "tp4", option=4, **node), counts)
    for before, after in zip(whole, ours, strict=True):
        for unsplit, got in zip(before, after, strict=True):
            for a, b in zip(unsplit, got, strict=True):
                close(b, a)


@pytest.mark.parametrize("decode_node", [True, False])
@pytest.mark.parametrize("name", ["tiny-bf16", "msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_static", "mix"])
def test_nothing_waits_for_the_device(four: Ranks, model: Callable[[str], Model], name: str, decode_node: bool) -> None:
    """On the meta device no tensor has values: whatever asked for one would raise."""
    made = model(name)
    served = Served(made.rest, made.shards, data=4, option=2, dtype=made.dtype)
    if decode_node:
        served = _node(made.rest, made.shards, option=2, dtype=made.dtype)
    counts = [3, 5, 0, 7]
    for rank, said in enumerate(four.run(steps.on_meta, served, counts)):
        assert len(said) >= 2
        assert set(said) == {f"meta [{counts[rank]}, 256]"}
