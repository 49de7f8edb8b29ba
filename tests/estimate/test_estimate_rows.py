"""The estimate of rows that are fixed, and of groups over data- and tensor-parallel ranks."""

from dataclasses import replace

import pytest

from reshard.errors import AlignmentError, UsageError
from reshard.estimate.profile import load_profile
from reshard.estimate.sizes import Options
from reshard.estimate.step import KINDS, Collective, Kernel, Split
from tests.support.estimating import A2, DYNAMIC, FLOAT, STATIC, estimated, layer_seconds, r1, wire

# --- fixed rows ---


@pytest.mark.parametrize("reduce_bytes", [2, 4])
def test_fixed_rows_are_multiplied_whatever_they_hold(reduce_bytes: int) -> None:
    """Everything but quantizing and packing grows from R T to R N rows, and what is kept is copied to and from.

    Without a cache and static costs, each byte that a vector kernel moves counts.
    """
    tokens, rows, hidden, share = 3, 10, 512, 128
    plain = load_profile("atlas-a2-376t", ["memory.cache_mib=0", "static.vector_us=0"])
    counted = Split(4, tokens, hidden, share, DYNAMIC, DYNAMIC, reduce_bytes=reduce_bytes)
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
    more = Kernel("vector", copies).seconds(plain) - Kernel("vector", not_done).seconds(plain)
    assert seconds["vector"] - full["vector"] == pytest.approx(more)
    assert (wire(A2, fixed), fixed.rows) == (wire(A2, all_tokens), 40)


def test_as_many_fixed_rows_as_tokens_cost_three_copies() -> None:
    """Tokens in, partial sums in, result out: what fits the cache takes the static cost of a kernel."""
    for way in (FLOAT, DYNAMIC, STATIC):
        counted = Split(8, 24, 7168, 2304, way, way)
        fixed = layer_seconds(A2, replace(counted, max_tokens=24))
        more = {kind: seconds - layer_seconds(A2, counted)[kind] for kind, seconds in fixed.items()}
        assert more == pytest.approx(dict.fromkeys(KINDS, 0) | {"vector": 3 * 2e-6})


def test_rows_that_stay_are_not_fixed() -> None:
    for copies in (1, 4):
        alone = Split(copies, 24, 7168, 2304, DYNAMIC, DYNAMIC, tensor_parallel_size=copies)
        assert layer_seconds(A2, replace(alone, max_tokens=64)) == layer_seconds(A2, alone)


def test_what_fixed_rows_cost_r1() -> None:
    found = estimated(r1("w8a8_dynamic"), (1, 4, 8), options=Options(24, max_tokens=64))
    one, four, eight = (size.fixed_rows for size in found.sizes)
    assert one is None
    assert four is not None
    assert eight is not None
    assert (eight.fixed.rows_per_layer, eight.exact.rows_per_layer) == (512, 192)
    assert (four.unneeded_rows_per_layer, eight.unneeded_rows_per_layer) == (4 * (64 - 24), 8 * (64 - 24))
    for run, rows in ((eight.fixed, 64), (eight.exact, 24)):
        assert (run.gather_bytes_per_layer, run.scatter_bytes_per_layer) == (rows * 7 * 7172, rows * 7 * 14336)
        assert run.gather_bytes_per_token_layer == round(rows * 7 * 7172 / 24)
    plain = estimated(r1("w8a8_dynamic"), (8,)).sizes[0]
    assert plain.fixed_rows is None
    assert eight.exact == plain.runs
    assert plain.runs.step_seconds == pytest.approx(3 * plain.runs.layer_seconds)
    assert found.sizes[2].runs == eight.fixed
    assert eight.fixed.step_seconds > eight.exact.step_seconds


def test_fewer_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="--max-tokens 23: every rank sends so many rows, and --batch gives it 24 tok"):
        Options(24, max_tokens=23)


# --- beside tensor parallelism ---


def test_tokens_travel_among_data_parallel_ranks_and_sums_are_added_by_tensor_parallel_ones() -> None:
    """16 ranks, 4 data-parallel ones of 4: the four that exchange rows lie over two meshes of eight."""
    split = Split(16, 24, 7168, 1152, DYNAMIC, DYNAMIC, tensor_parallel_size=4)
    sums = 24 * 2 * 2 * 7168 * 3 // 4
    assert wire(A2, split) == (24 * 3 * 7172, 24 * 3 * 2 * 7168 + sums, 2 * 2 + 2 * 3)
    seconds, four = layer_seconds(A2, split), replace(split, tp_size=4, tensor_parallel_size=1)
    assert seconds["gather"] == Collective("gather", 4, 24 * 7172, 16).seconds(A2) > layer_seconds(A2, four)["gather"]
    assert seconds["scatter"] == pytest.approx(
        Collective("scatter", 4, 24 * 2 * 7168, 16).seconds(A2)
        + Collective("scatter", 4, 24 * 2 * 7168, 4, all_reduce=True).seconds(A2)
    )
    assert (seconds["matmul"], seconds["vector"]) == (
        layer_seconds(A2, four)["matmul"],
        layer_seconds(A2, four)["vector"],
    ), "4 times 24 rows either way"
    fixed = replace(split, max_tokens=64)
    assert fixed.rows == 4 * 64
    assert wire(A2, fixed)[:2] == (64 * 3 * 7172, 64 * 3 * 2 * 7168 + sums), "24 results are added up"


def test_the_tensor_parallel_size_alone_is_the_engine_s_own_cut() -> None:
    options = Options(24, tensor_parallel_size=4)
    found = estimated(r1("w8a8_dynamic"), (4, 6, 8, 16), options=options)
    assert [size.tp_size for size in found.sizes] == [4, 8, 16]
    assert [(refused.tp_size, refused.reason) for refused in found.refused] == [
        (6, "it counts tensor-parallel ranks, too: expected a multiple of 4")
    ]
    four, eight, _ = found.sizes
    (plain,) = estimated(r1("w8a8_dynamic"), (4,)).sizes
    assert found.unsplit_bytes == four.held_bytes == plain.held_bytes
    assert (four.saved_bytes, eight.saved_bytes) == (0, four.held_bytes - eight.held_bytes)
    assert four.gathered_as_bf16 == four.gathered_as_int8
    assert (four.runs.gather_bytes_per_layer, four.runs.seconds["gather"]) == (0, 0)
    assert four.runs.scatter_bytes_per_layer == 24 * 2 * 2 * 7168 * 3 // 4
    assert found.reasons[0] == "no other size takes less than the 0.479 ms at tp 4"
    alone = estimated(r1("w8a8_dynamic"), (8,), options=options)
    assert (alone.unsplit_bytes, alone.unsplit_seconds) == (four.held_bytes, four.runs.step_seconds)
    assert alone.reasons == (
        "0.528 ms a step, 0.479 ms at tp 4; a device holds 0.139 GiB and saves 0.139",
        "tp 4 takes less: this saves memory, not time",
    )


def test_a_tensor_parallel_size_that_cannot_be_cut_for() -> None:
    with pytest.raises(AlignmentError, match="is not divisible by tp 5"):
        estimated(r1("bf16"), (5, 10), options=Options(24, tensor_parallel_size=5))
