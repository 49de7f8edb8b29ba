"""What ranks must agree in, and what a rank does with arguments that are wrong: nobody is left waiting."""

import copy
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import GroupError, ReshardError, TokensError
from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, links, load_shard
from reshard_runtime.collectives import Collectives, LinkedCollectives, PairwiseCollectives
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.links import Links, links_of
from reshard_runtime.tokens import pad, token_layout
from tests.support.builders import Spec, build
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.support.unsplit import CountingKernels, TensorCpuKernels

HIDDEN = 256
Said = tuple[str, str] | None


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets `tp2`, `tp4` of one model, and `other2` of another with the same shapes."""
    folder = tmp_path_factory.mktemp("sets")
    for name, seed in (("model", 0), ("another", 1)):
        build(folder / name, Spec("modelslim_dynamic", HIDDEN, 512, computable=True, seed=seed))
    for name, source, size in (("tp2", "model", 2), ("tp4", "model", 4), ("other2", "another", 2)):
        split(folder / source, folder / name, Cut(size))
    return folder


def _error(call: Callable[[], Any]) -> Said:
    """(type, message) of what it raises."""
    try:
        call()
    except ReshardError as error:
        return type(error).__name__, str(error)
    return None


def _tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


# What rank 1 alone does otherwise, and what both ranks say of it.
DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "set": ({"folder": "other2"}, "shard set is '"),
    "layer": ({"index": 1}, "layer is 0 on rank 0 of the group and 1 on rank 1"),
    "max_tokens": ({"max_tokens": 8}, "max_tokens is None on rank 0 of the group and 8 on rank 1"),
    "reduce_dtype": ({"reduce_dtype": torch.float32}, "reduce_dtype is None on rank 0 of the group and torch.float32"),
    "tokens": ({"tokens": "replicated"}, "tokens is 'scattered' on rank 0 of the group and 'replicated' on rank 1"),
    "mix": ({"mix": "static"}, "mix is 'dynamic' on rank 0 of the group and 'static' on rank 1"),
    "offset": ({"offset": True}, "down_proj.weight_offset is not zero (the largest is 3)"),
    "rank": ({"rank": 0}, "layer 0: rank 0's shard, and this is rank 1 of the group"),
    "size": ({"folder": "tp4"}, "layer 0: its shard is one of 4, and a group of 2 was given"),
    "option": ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    "dtype": ({"reduce_dtype": torch.int8}, "reduce_dtype is torch.int8; it may be"),
}


def _disagree(group: dist.ProcessGroup, folder: Path, other: dict[str, Any]) -> Said:
    options = dict(other) if group.rank() == 1 else {}
    shard = load_shard(folder / options.pop("folder", "tp2"), options.pop("rank", group.rank()))
    layer = shard.layer(options.pop("index", 0))
    if options.pop("offset", False):
        offset = torch.full_like(layer.down.tensors["weight_offset"], 3)
        layer = replace(layer, down=replace(layer.down, tensors={**layer.down.tensors, "weight_offset": offset}))
    return _error(lambda: DenseFFN(layer, group, **options))


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_difference_on_one_rank_is_an_error_on_all(ranks: Callable[[int], Ranks], shards: Path, case: str) -> None:
    other, message = DISAGREEMENTS[case]
    said = ranks(2).run(_disagree, shards, other)
    for one in said:
        assert one is not None
        assert message in one[1]
    assert said[0][0] == "GroupError"


@pytest.mark.parametrize("size", [2, 4])
def test_without_a_group_a_part_is_refused(shards: Path, size: int) -> None:
    with pytest.raises(GroupError, match=f"its shard is one of {size}, and no group was given; pass the group"):
        DenseFFN(load_shard(shards / f"tp{size}", 0).layer(0))


def _wrong(group: dist.ProcessGroup, folder: Path, case: str) -> tuple[Said, torch.Tensor | None, torch.Tensor]:
    """Rank 1's tokens are wrong; then all are right. (error, result, the result with zeros instead)."""
    wrong: dict[str, tuple[torch.Tensor, dict[str, Any], int | None]] = {
        "hidden size": (torch.zeros(3, HIDDEN + 1).bfloat16(), {}, None),
        "type": (_tokens(3).float(), {}, None),
        "count": (_tokens(2), {"tokens_per_rank": [4, 3]}, None),
        "no tokens": (_tokens(0), {"tokens_per_rank": [4, 3]}, None),
        "more than the buffer": (_tokens(9), {}, 8),
        "device": (torch.zeros(3, HIDDEN, dtype=torch.bfloat16, device="meta"), {}, None),
    }
    bad, arguments, max_tokens = wrong[case]
    rank, listed = group.rank(), "tokens_per_rank" in arguments
    ffn = DenseFFN(load_shard(folder / "tp2", rank).layer(0), group, max_tokens=max_tokens)
    own = _tokens(4 if listed else 3, seed=7)
    results: list[torch.Tensor] = []
    error = _error(lambda: results.append(ffn(own if rank == 0 else bad, **arguments)))
    right = ffn(own if rank == 0 else torch.zeros(3, HIDDEN).bfloat16(), **arguments)
    return error, results[0] if results else None, right


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("hidden size", "x is [3, 257], its last dim must be hidden_size 256"),
        ("type", "x is torch.float32, the layer was made for torch.bfloat16"),
        ("count", "x has 2 tokens, tokens_per_rank[1] is 3"),
        ("no tokens", "x has 0 tokens, tokens_per_rank[1] is 3"),
        ("more than the buffer", "x has 9 tokens, the buffers are fixed for max_tokens=8"),
        ("device", "x is on meta, the layer on cpu"),
    ],
)
def test_a_rank_with_wrong_tokens_takes_part_and_then_raises(
    ranks: Callable[[int], Ranks], shards: Path, case: str, message: str
) -> None:
    (no_error, result, right), (error, nothing, _) = ranks(2).run(_wrong, shards, case)
    assert error == ("TokensError", f"layer 0, rank 1: {message}")
    assert (no_error, nothing) == (None, None)
    assert torch.equal(result, right)


BAD_LISTS: dict[str, tuple[Any, int | None, str]] = {
    "short": ([3], None, "tokens_per_rank has 1 counts, the group has 2 ranks"),
    "long": ([3, 3, 0], None, "tokens_per_rank has 3 counts, the group has 2 ranks"),
    "negative": ([3, -1], None, "tokens_per_rank[1] is -1; a count is an integer from 0 to 2147483647"),
    "float": ([3.0, 3], None, "tokens_per_rank[0] is 3.0; a count"),
    "tensor": (torch.tensor([3, 3]), None, "tokens_per_rank[0] is tensor(3); a count"),
    "bool": ([True, 3], None, "tokens_per_rank[0] is True; a count"),
    "above the buffer": ([3, 9], 8, "tokens_per_rank[1] is 9, the buffers are fixed for max_tokens=8"),
}


def _listed(group: dist.ProcessGroup, folder: Path, counts: list[Any], max_tokens: int | None) -> tuple[Said, int]:
    kernels = CountingKernels()
    ffn = DenseFFN(load_shard(folder / "tp2", group.rank()).layer(0), group, max_tokens=max_tokens, kernels=kernels)
    return _error(lambda: ffn(_tokens(3), tokens_per_rank=counts)), len(kernels.calls)


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_wrong_list_is_an_error_everywhere(ranks: Callable[[int], Ranks], shards: Path, case: str) -> None:
    counts, max_tokens, message = BAD_LISTS[case]
    for error, calls in ranks(2).run(_listed, shards, counts, max_tokens):
        assert error is not None
        assert error[0] == "TokensError"
        assert error[1].startswith(message)
        assert calls == (0 if max_tokens is None else 2)  # with fixed rows it takes part, as the others may be right


# What each rank brings and is told, and what all of them say of it.
COUNTS: dict[str, tuple[list[tuple[int, Any]], dict[str, Any], str]] = {
    "the same maximum": ([(3, [3, 4]), (4, [2, 4])], {}, "[3, 4] on rank 0 of the group, [2, 4] on rank 1"),
    "another maximum": ([(3, [3, 4]), (5, [3, 5])], {}, "[3, 4] on rank 0 of the group, [3, 5] on rank 1"),
    "of others": ([(1, [1, 1, 0, 2])] * 3 + [(2, [1, 1, 1, 2])], {}, "[1, 1, 0, 2] on rank 0 of the group, [1, 1, 1"),
    "no list": ([(3, None), (5, None)], {}, "[3, 3] on rank 0 of the group, [5, 5] on rank 1"),
    "no list, none on one": ([(0, None), (5, None)], {}, "[0, 0] on rank 0 of the group, [5, 5] on rank 1"),
    "none for one": ([(3, [3, 0]), (0, [0, 0])], {}, "[3, 0] on rank 0 of the group, [0, 0] on rank 1"),
    "a list on one": ([(3, [3, 4]), (4, None)], {}, "[3, 4] on rank 0 of the group, [4, 4] on rank 1"),
    "more than a message": ([(3, None), (9000, None)], {}, "[3, 3] on rank 0 of the group, [9000, 9000] on rank 1"),
    "replicated": ([(3, None), (5, None)], {"tokens": "replicated"}, "[3, 3] on rank 0 of the group, [5, 5] on rank 1"),
    "a collective of its own": ([(3, [3, 4]), (5, [3, 5])], {"check_counts": True}, "[3, 4] on rank 0 of the group"),
    "and fixed rows": ([(3, [3, 4]), (4, [4, 4])], {"max_tokens": 8}, ""),
}  # fmt: skip


def _told(group: dist.ProcessGroup, folder: Path, case: str) -> tuple[Said, Said, torch.Tensor]:
    """What is said of the counts; then all ranks are told the same."""
    told, options, _ = COUNTS[case]
    kernels = TensorCpuKernels() if options.get("check_counts") else CpuKernels()
    layer = load_shard(folder / f"tp{group.size()}", group.rank()).layer(0)
    ffn = DenseFFN(layer, group, kernels=kernels, **options)
    count, counts = told[group.rank()]
    said = _error(lambda: ffn(_tokens(count), tokens_per_rank=counts))
    after = _error(lambda: ffn(_tokens(0), tokens_per_rank=None)) if "max_tokens" not in options else None
    return said, after, ffn(_tokens(3, seed=7))


@pytest.mark.parametrize("case", COUNTS)
def test_counts_that_differ_are_an_error_on_all_ranks(ranks: Callable[[int], Ranks], shards: Path, case: str) -> None:
    told, _, message = COUNTS[case]
    found = ranks(len(told)).run(_told, shards, case)
    alone = ranks(len(told)).run(_pair, shards, f"tp{len(told)}", 7, 3)
    for said, after, _ in found:
        assert after is None
        if not message:  # the lists do not count
            assert said is None
            continue
        assert said is not None
        assert said[0] == "TokensError"
        assert said[1].startswith(f"the ranks' counts of tokens differ: {message}")
        assert said == found[0][0]
    assert torch.equal(found[0][2], alone[0])


def _unusable(group: dist.ProcessGroup, folder: Path, max_tokens: int | None) -> tuple[Said, torch.Tensor | None]:
    ffn = DenseFFN(load_shard(folder / "tp2", group.rank()).layer(0), group, max_tokens=max_tokens)
    results: list[torch.Tensor] = []
    counts = [3, 3] if group.rank() == 0 else [3]
    said = _error(lambda: results.append(ffn(_tokens(3, seed=7), tokens_per_rank=counts)))
    return said, results[0] if results else None


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_a_rank_with_a_wrong_list_leaves_none_waiting(
    ranks: Callable[[int], Ranks], shards: Path, max_tokens: int | None
) -> None:
    (other, result), (own, nothing) = ranks(2).run(_unusable, shards, max_tokens)
    assert own == ("TokensError", "tokens_per_rank has 1 counts, the group has 2 ranks")
    assert nothing is None
    if max_tokens is None:
        assert other is not None
        assert "differ: [3, 3] on rank 0 of the group, a list that cannot be used on rank 1; give every" in other[1]
    else:
        assert other is None
        assert tuple(result.shape) == (3, HIDDEN)


def _groups(world: dist.ProcessGroup, folder: Path) -> tuple[torch.Tensor, int]:
    """Ranks 0, 1 and 2, 3 of the world are a group each, with another set each."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[world.rank() // 2]
    kernels = CountingKernels()
    name = "tp2" if world.rank() < 2 else "other2"
    ffn = DenseFFN(load_shard(folder / name, group.rank()).layer(0), group, kernels=kernels)
    # Only the second group calls a second time: the first must not be needed for it.
    y_TH = ffn(_tokens(4, seed=world.rank()))
    return (ffn(_tokens(2, seed=world.rank())) if world.rank() >= 2 else y_TH), len(kernels.calls)


def _pair(group: dist.ProcessGroup, folder: Path, name: str, first: int, count: int) -> torch.Tensor:
    return DenseFFN(load_shard(folder / name, group.rank()).layer(0), group)(_tokens(count, seed=first + group.rank()))


def test_groups_that_are_parts_of_the_world(ranks: Callable[[int], Ranks], shards: Path) -> None:
    found = ranks(4).run(_groups, shards)
    wanted = [*ranks(2).run(_pair, shards, "tp2", 0, 4), *ranks(2).run(_pair, shards, "other2", 2, 2)]
    for (y_TH, calls), same, number in zip(found, wanted, (2, 2, 4, 4), strict=True):
        assert torch.equal(y_TH, same)
        assert calls == number


def _destroyed(world: dist.ProcessGroup, folder: Path) -> tuple[Said, bool]:
    """What a layer says whose group was destroyed, and a copy of it."""
    group = dist.new_group([0, 1])
    ffn = DenseFFN(load_shard(folder / "tp2", group.rank()).layer(0), group)
    copied = copy.deepcopy(ffn)
    same = torch.equal(ffn(_tokens(3)), copied(_tokens(3)))
    dist.destroy_process_group(group)
    del group
    said = _error(lambda: ffn(_tokens(3)))
    assert said == _error(lambda: copied(_tokens(3)))
    return said, same


def test_a_group_that_was_destroyed_is_one_clear_error(ranks: Callable[[int], Ranks], shards: Path) -> None:
    message = (
        "the process group of this layer is gone: it was destroyed, or nothing holds it; make the layer again with a "
        "group that is there"
    )
    assert ranks(2).run(_destroyed, shards) == [(("GroupError", message), True)] * 2


def _summed(group: dist.ProcessGroup, dtype: torch.dtype, each: int) -> list[tuple[torch.Tensor, ...]]:
    rows = torch.randn(group.size() * each, 5, generator=torch.Generator().manual_seed(group.rank())).to(dtype)
    made = (CpuKernels().collectives(group), PairwiseCollectives(group), Collectives(group))
    assert isinstance(made[0], LinkedCollectives)
    return [(c.gather(rows), c.reduce_scatter(rows.clone()), c.all_reduce(rows.clone())) for c in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "each"), [(1, 3), (2, 3), (4, 3), (4, 30_000)])  # the last are more than a message
def test_collectives(ranks: Callable[[int], Ranks], size: int, each: int, dtype: torch.dtype) -> None:
    rows = [torch.randn(size * each, 5, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)]
    total = rows[0].float()
    for other in rows[1:]:
        total = total + other.float()
    allowed = size * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-23) * torch.stack(rows).abs().sum(0).max()
    for rank, (*pairwise, tensor) in enumerate(ranks(size).run(_summed, dtype, each)):
        own = slice(each * rank, each * rank + each)
        for gathered, scattered, reduced in (*pairwise, tensor):
            assert torch.equal(gathered, torch.cat(rows))
            assert (scattered - total[own]).abs().max() <= allowed
            assert (reduced - total).abs().max() <= allowed
        for _, scattered, reduced in pairwise:
            assert scattered.dtype == reduced.dtype == torch.float32
            assert torch.equal(scattered, total[own])  # by rank, in float32: to the bit
            assert torch.equal(reduced, total)


def _many_and_few(group: dist.ProcessGroup, linked: bool) -> tuple[Said, list[bool]]:
    collectives = CpuKernels().collectives(group) if linked else PairwiseCollectives(group)
    rows = torch.arange(400_000.0).reshape(-1, 4) + group.rank()
    said = _error(lambda: collectives.gather(rows if group.rank() == 1 else rows[:5]))
    some = (rows, rows[:5], rows[:, :3])
    wanted = [torch.cat([own - group.rank() + rank for rank in range(4)]) for own in some]
    return said, [torch.equal(collectives.gather(own), all_of) for own, all_of in zip(some, wanted, strict=True)]


@pytest.mark.parametrize("linked", [True, False])
def test_rows_that_take_messages_of_their_own(ranks: Callable[[int], Ranks], linked: bool) -> None:
    """Also where only one rank has so many, and behind that; rows that are not contiguous."""
    for said, same in ranks(4).run(_many_and_few, linked):
        assert said is not None
        assert "differ: [5, 5, 5, 5] on rank 0 of the group, [100000, 100000, 100000, 100000] on rank 1;" in said[1]
        assert same == [True] * 3


@pytest.mark.parametrize(
    ("closed", "message"),
    [(True, "rank 0 of the group is gone: "), (False, "rank 0 of the group sent nothing for 0.01 s")],
)
def test_a_rank_that_is_gone_and_one_that_is_silent(closed: bool, message: str) -> None:
    """The second call cannot tell what belongs to the first."""
    here, there = socket.socketpair()
    connected = Links([here, None], 0.01)
    if closed:
        there.close()
    for text in (message, "the group's last exchange was broken off, and its ranks are out of step"):
        said = _error(lambda: connected.exchange(b"", [memoryview(b"")] * 2, [memoryview(bytearray())] * 2))
        assert said is not None
        assert said[0] == "GroupError"
        assert said[1].startswith(text)
    here.close()
    there.close()


def _on_another_host(group: dist.ProcessGroup, folder: Path, boot: Path) -> tuple[bool, type, torch.Tensor]:
    """Rank 1 has started up with another boot id: (whether linked, how tokens travel, the result of 3 tokens each)."""
    boot.write_text("another host")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(links, "_connected", type(links._connected)())
        if group.rank() == 1:
            patched.setattr(links, "_BOOT", boot)
        collectives = CpuKernels().collectives(group)
        ffn = DenseFFN(load_shard(folder / "tp4", group.rank()).layer(0), group)
        return links_of(group) is not None, type(collectives), ffn(_tokens(3, seed=group.rank()))


def _on_one_host(group: dist.ProcessGroup, folder: Path) -> tuple[bool, type, torch.Tensor]:
    ffn = DenseFFN(load_shard(folder / "tp4", group.rank()).layer(0), group)
    return links_of(group) is not None, type(CpuKernels().collectives(group)), ffn(_tokens(3, seed=group.rank()))


def test_ranks_of_two_hosts_are_not_linked(ranks: Callable[[int], Ranks], shards: Path, tmp_path: Path) -> None:
    apart = ranks(4).run(_on_another_host, shards, tmp_path / "boot_id")
    beside = ranks(4).run(_on_one_host, shards)
    assert [result[:2] for result in apart] == [(False, PairwiseCollectives)] * 4
    assert [result[:2] for result in beside] == [(True, LinkedCollectives)] * 4
    for (*_, one), (*_, other) in zip(apart, beside, strict=True):
        assert torch.equal(one, other)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 4))
def test_padding_comes_and_goes(counts: list[int], width: int) -> None:
    layout = token_layout(counts[0], len(counts), counts, None)
    rows_TW = torch.arange(float(sum(counts) * width)).reshape(-1, width) + 1
    assert (layout.rows, layout.total) == (max(counts), sum(counts))
    padded = layout.restore_padding(rows_TW)
    assert padded.shape == (len(counts) * max(counts), width)
    assert torch.equal(layout.drop_padding(padded), rows_TW)
    for rank, (part, own) in enumerate(zip(rows_TW.split(counts), padded.split(max(counts) or 1), strict=False)):
        assert torch.equal(own, pad(part, max(counts))), rank


@given(st.integers(0, 6), st.integers(1, 9), st.integers(6, 9))
def test_fixed_rows_do_not_depend_on_counts(own: int, size: int, max_tokens: int) -> None:
    fixed = token_layout(own, size, None, max_tokens)
    assert fixed == token_layout(0, size, [own] * size, max_tokens)
    assert (fixed.rows, fixed.total, fixed.dense) == (max_tokens, size * max_tokens, True)


def test_counts_above_the_buffer_are_refused() -> None:
    with pytest.raises(TokensError, match=r"tokens_per_rank\[1\] is 7, .* max_tokens=6"):
        token_layout(1, 2, [1, 7], 6)
