"""The estimate of rows that are fixed, and of groups over data- and tensor-parallel ranks."""

from dataclasses import replace

import pytest

from reshard.checkpoint.config_only import promised, read_config
from reshard.checkpoint.description import Checkpoint
from reshard.errors import AlignmentError, UsageError
from reshard.estimate.fixed import fixed_rows
from reshard.estimate.model import all_reduce_seconds, collective_seconds, vector_seconds
from reshard.estimate.profile import load_profile
from reshard.estimate.recommend import recommend
from reshard.estimate.sizes import Options, Size, estimate
from reshard.estimate.step import Split, layer_seconds, wire_of
from tests.support.paths import CONFIGS

A2 = load_profile("atlas-a2-376t")


def r1(scheme: str) -> Checkpoint:
    return promised(read_config(CONFIGS / "deepseek-r1.json"), "deepseek-r1", scheme)


def exact(tp_size: int) -> Size:
    return estimate(r1("w8a8_dynamic"), "w8a8_dynamic", (tp_size,), A2, Options(24)).sizes[0]


# --- fixed rows ---


@pytest.mark.parametrize("reduce_bytes", [2, 4])
def test_fixed_rows_are_multiplied_whatever_they_hold(reduce_bytes: int) -> None:
    """Everything but quantizing and packing grows from R T to R N rows, and what is kept is copied to and from.

    Without a cache and static costs, each byte that a vector kernel moves counts.
    """
    tokens, rows, hidden, share = 3, 10, 512, 128
    plain = load_profile("atlas-a2-376t", ["memory.cache_mib=0", "static.vector_us=0"])
    counted = Split(4, tokens, hidden, share, "dynamic", "dynamic", reduce_bytes=reduce_bytes)
    all_tokens = replace(counted, tokens=rows)
    fixed = replace(counted, max_tokens=rows)
    seconds, full = layer_seconds(plain, fixed), layer_seconds(plain, all_tokens)
    assert {kind: seconds[kind] for kind in ("matmul", "gather", "scatter")} == {
        kind: full[kind] for kind in ("matmul", "gather", "scatter")
    }
    not_done = (rows - tokens) * (3 * hidden + 2 * (hidden + 4))
    copies = 2 * tokens * (hidden + 4) + (rows - tokens) * (hidden + 4) + 2 * 4 * rows * hidden * reduce_bytes
    if reduce_bytes == 2:
        copies += 2 * tokens * hidden * 2
    else:  # narrowed into a tensor of its own anyway
        not_done += (rows - tokens) * hidden * (2 + 4)
    assert seconds["vector"] - full["vector"] == pytest.approx(
        vector_seconds(plain, copies) - vector_seconds(plain, not_done)
    )
    assert (wire_of(A2, fixed), fixed.rows) == (wire_of(A2, all_tokens), 40)


def test_as_many_fixed_rows_as_tokens_cost_three_copies() -> None:
    """Tokens in, partial sums in, result out: what fits the cache takes the static cost of a kernel."""
    for way in ("bf16", "dynamic", "static"):
        counted = Split(8, 24, 7168, 2304, way, way)  # type: ignore[arg-type]
        fixed = layer_seconds(A2, replace(counted, max_tokens=24))
        more = {kind: seconds - layer_seconds(A2, counted)[kind] for kind, seconds in fixed.items()}
        assert more == pytest.approx({"matmul": 0, "vector": 3 * 2e-6, "gather": 0, "scatter": 0})


def test_rows_that_stay_are_not_fixed() -> None:
    for copies in (1, 4):
        alone = Split(copies, 24, 7168, 2304, "dynamic", "dynamic", tensor_parallel_size=copies)
        assert layer_seconds(A2, replace(alone, max_tokens=64)) == layer_seconds(A2, alone)


def test_what_fixed_rows_cost_r1() -> None:
    checkpoint, options = r1("w8a8_dynamic"), Options(24, max_tokens=64)
    found = estimate(checkpoint, "w8a8_dynamic", (1, 4, 8), A2, options)
    four, eight = fixed_rows(checkpoint, found, A2, options)
    assert [cost.tp_size for cost in (four, eight)] == [4, 8]
    assert (eight.fixed.rows, eight.exact.rows, eight.unneeded) == (512, 192, 8 * (64 - 24))
    assert (eight.fixed.gathered, eight.exact.gathered) == (64 * 7 * 7172, 24 * 7 * 7172)
    assert (eight.fixed.scattered, eight.exact.scattered) == (64 * 7 * 14336, 24 * 7 * 14336)
    assert eight.exact.step_seconds == exact(8).runs.step_seconds == pytest.approx(3 * eight.exact.layer_seconds)
    assert eight.fixed.step_seconds == found.sizes[2].runs.step_seconds > eight.exact.step_seconds
    assert fixed_rows(checkpoint, found, A2, Options(24)) == ()


def test_fewer_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="--max-tokens 23: every rank sends so many rows, and --batch gives it 24 tok"):
        Options(24, max_tokens=23)


# --- beside tensor parallelism ---


def test_tokens_travel_among_data_parallel_ranks_and_sums_are_added_by_tensor_parallel_ones() -> None:
    """16 ranks, 4 data-parallel ones of 4: the four that exchange rows lie over two meshes of eight."""
    split = Split(16, 24, 7168, 1152, "dynamic", "dynamic", tensor_parallel_size=4)
    wire = wire_of(A2, split)
    assert wire.gathered == 24 * 3 * 7172
    assert wire.scattered == 24 * 3 * 2 * 7168 + 24 * 2 * 2 * 7168 * 3 // 4
    assert wire.messages == 2 * 2 + 2 * 3
    seconds, four = layer_seconds(A2, split), replace(split, tp_size=4, tensor_parallel_size=1)
    assert seconds["gather"] == collective_seconds(A2, 4, 24 * 7172, 16) > layer_seconds(A2, four)["gather"]
    assert seconds["scatter"] == pytest.approx(
        collective_seconds(A2, 4, 24 * 2 * 7168, 16) + all_reduce_seconds(A2, 4, 24 * 2 * 7168)
    )
    assert (seconds["matmul"], seconds["vector"]) == (
        layer_seconds(A2, four)["matmul"],
        layer_seconds(A2, four)["vector"],
    ), "4 times 24 rows either way"
    fixed = replace(split, max_tokens=64)
    assert (fixed.rows, wire_of(A2, fixed).gathered) == (4 * 64, 64 * 3 * 7172)
    assert wire_of(A2, fixed).scattered == 64 * 3 * 2 * 7168 + 24 * 2 * 2 * 7168 * 3 // 4, "24 results are added up"


def test_the_tensor_parallel_size_alone_is_the_engine_s_own_cut() -> None:
    found = estimate(r1("w8a8_dynamic"), "w8a8_dynamic", (4, 6, 8, 16), A2, Options(24, tensor_parallel_size=4))
    assert [size.tp_size for size in found.sizes] == [4, 8, 16]
    assert [(refused.tp_size, refused.reason) for refused in found.refused] == [
        (6, "it counts tensor-parallel ranks, too: a multiple of 4 is wanted")
    ]
    four = found.sizes[0]
    assert found.unsplit.held == four.held == exact(4).held
    assert (four.saved, found.sizes[1].saved) == (0, four.held - found.sizes[1].held)
    assert four.as_bf16 == four.as_int8
    assert (four.runs.wire.gathered, four.runs.seconds["gather"]) == (0, 0)
    assert four.runs.wire.scattered == 24 * 2 * 2 * 7168 * 3 // 4
    assert recommend(A2, found).reasons[0] == "no other size takes less than the 0.383 ms at tp 4"
    alone = estimate(r1("w8a8_dynamic"), "w8a8_dynamic", (8,), A2, Options(24, tensor_parallel_size=4))
    assert alone.unsplit == four
    assert recommend(A2, alone).reasons == (
        "0.402 ms a step, 0.383 ms at tp 4; a device holds 0.139 GiB and saves 0.139",
        "tp 4 takes less: this saves memory, not time",
    )


def test_a_tensor_parallel_size_that_cannot_be_cut_for() -> None:
    with pytest.raises(AlignmentError, match="is not divisible by tp 5"):
        estimate(r1("bf16"), "bf16", (5, 10), A2, Options(24, tensor_parallel_size=5))
