"""How tokens and partial sums travel over a group. The same calls with the same sizes on every rank.

Shapes: P tokens of a rank, padded to the same number everywhere; R ranks; W what a token is on the way (H values, or
H bytes and a scale); H hidden_size.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from reshard.errors import TokensError
from reshard.tensors.dtypes import RANKS_IN_OWN_TYPE
from reshard_runtime.gloo_threads import let_go_before_exit
from reshard_runtime.group import HeldWeakly
from reshard_runtime.links import links_of

_Bytes = npt.NDArray[np.uint8]

# What a rank sends to all others with its counts (73 BF16 tokens of 7168 of 4 ranks, 31 of 8). More follows
# in messages of its own: each of those costs, and so does the copy that gloo wants for each other rank.
_AT_ONCE = 3 << 20
_ROWS_TAG = 0x7265
"""Of those messages: nobody else's on the group."""
# torch 2.13 renamed them, and warns of the names that torch before it has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """By the collectives of the group's backend (hccl, nccl), which add in the type that travels.

    `out`: where the result is to stand, of its shape and type; a new tensor without. `counts`: what this rank was told
    of each rank's tokens, for a collective that `compares` them.
    """

    in_float32 = False
    """Whether sums are added in float32, whatever type they travel in."""

    compares = False
    """Whether the counts are compared wherever tokens travel, for no collective and no waiting of its own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._held = HeldWeakly(group)

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._held()

    def gather(
        self, rows_PW: torch.Tensor, out: torch.Tensor | None = None, counts: Sequence[int] = ()
    ) -> torch.Tensor:
        """Every rank's rows, by rank: [R*P, W]."""
        if out is None:
            out = rows_PW.new_empty(len(rows_PW) * self._group.size(), rows_PW.shape[1])
        _all_gather(out, rows_PW, group=self._group)
        return out

    def compare(self, counts: Sequence[int], device: torch.device) -> None:
        """Compare what the ranks were told of each rank's tokens, in a collective of its own, which the host awaits.

        Raises TokensError on every rank where it differs.
        """
        told = torch.tensor([counts], device=device)
        check_counts(Collectives.gather(self, told).tolist())

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over the ranks of this rank's rows of [R*P, H]: [P, H]."""
        if out is None:
            out = partial_RPH.new_empty(len(partial_RPH) // self._group.size(), partial_RPH.shape[1])
        _reduce_scatter(out, partial_RPH, group=self._group)
        return out

    def all_reduce(self, partial_PH: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        """The sum over the ranks: [P, H]."""
        dist.all_reduce(partial_PH, group=self._group)
        return partial_PH


class PairwiseCollectives(Collectives):
    """gloo's: every rank sends every other its rows, which adds them itself, in float32 and in the order of the ranks.

    gloo's own reduce_scatter adds in the type that travels and took 1.1 to 5 times as long (2 and 4 processes, 1 to
    64 tokens of 7168).

    The counts travel ahead of the rows, in one message, and are compared before a row is used. gloo ends the process
    where a message is longer than the one awaited, and takes a shorter one: a full-sized one is awaited.
    """

    in_float32 = True
    compares = True

    def gather(
        self, rows_PW: torch.Tensor, out: torch.Tensor | None = None, counts: Sequence[int] = ()
    ) -> torch.Tensor:
        """Raises TokensError on every rank where their counts differ; the group can be used as before."""
        rank, size = self._group.rank(), self._group.size()
        told, own = _bytes_of(counts or [len(rows_PW)] * size), _bytes(rows_PW)
        ahead, stop = len(told), len(told) + len(own)
        at_once = stop <= _room(size)
        others = self._exchange(told, own if at_once else own[:0])
        if out is None:
            out = rows_PW.new_empty(size * len(rows_PW), rows_PW.shape[1])
        if not at_once:
            self._exchange_rows(rows_PW.contiguous(), out)
            return out
        by_rank = _bytes(out).reshape(size, -1)
        by_rank[:rank], by_rank[rank], by_rank[rank + 1 :] = others[:rank, ahead:stop], own, others[rank:, ahead:stop]
        return out

    def compare(self, counts: Sequence[int], device: torch.device) -> None:
        told = _bytes_of(counts)
        self._exchange(told, told[:0])

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        received = torch.empty_like(partial_RPH)
        self._all_to_all(received, partial_RPH)
        return _sum(received, self._group.size(), out)

    def all_reduce(self, partial_PH: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        return _sum(self.gather(partial_PH, counts=counts), self._group.size())

    def _exchange(self, told: _Bytes, own: _Bytes) -> _Bytes:
        """The others' `told`, which must be this rank's, and `own`: [R - 1, _room(R)], set as far as they sent any."""
        rank, others = self._group.rank(), self._group.size() - 1
        room = _room(others + 1)
        message = np.empty((others, len(told) + len(own)), np.uint8)
        message[:, : len(told)], message[:, len(told) :] = told, own
        received = np.empty((others, room), np.uint8)
        awaited, sent = [room] * others, [message.shape[1]] * others
        for sizes in (awaited, sent):
            sizes.insert(rank, 0)
        self._all_to_all(*(torch.from_numpy(each.reshape(-1)) for each in (received, message)), awaited, sent)
        if (received[:, : len(told)] != told).any():
            by_rank = received[:, : len(told)].copy().view(np.int64).tolist()
            by_rank.insert(rank, told.view(np.int64).tolist())
            check_counts(by_rank)
        return received

    def _all_to_all(self, into: torch.Tensor, of: torch.Tensor, *sizes: list[int]) -> None:
        of = of.detach()  # a tensor that nobody else holds, of the same memory
        dist.all_to_all_single(into, of, *sizes, group=self._group)
        let_go_before_exit(into, of)

    def _exchange_rows(self, own: torch.Tensor, out: torch.Tensor) -> None:
        """Every rank's rows, by rank, from and into the tensors' own memory: gloo's all_gather copies them twice."""
        rank, by_rank = self._group.rank(), out.chunk(self._group.size())
        others = [*range(rank + 1, len(by_rank)), *range(rank)]  # not all to the same one first
        awaited = [dist.irecv(by_rank[r], group=self._group, tag=_ROWS_TAG, group_src=r) for r in others]
        sent = [dist.isend(own, group=self._group, tag=_ROWS_TAG, group_dst=r) for r in others]
        by_rank[rank].copy_(own)
        for message in awaited + sent:
            message.wait()


class LinkedCollectives(Collectives):
    """Of ranks that `links_of` connects: as `PairwiseCollectives`, without gloo."""

    in_float32 = True
    compares = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._rank, self._size = group.rank(), group.size()

    def gather(
        self, rows_PW: torch.Tensor, out: torch.Tensor | None = None, counts: Sequence[int] = ()
    ) -> torch.Tensor:
        """Raises TokensError on every rank where their counts differ; the group can be used as before."""
        if out is None:
            out = rows_PW.new_empty(self._size * len(rows_PW), rows_PW.shape[1])
        own, places = _bytes(rows_PW), [*_bytes(out).reshape(self._size, -1)]
        self._exchange(counts or [len(rows_PW)] * self._size, [own] * self._size, places)
        places[self._rank][:] = own
        return out

    def compare(self, counts: Sequence[int], device: torch.device) -> None:
        nothing = [np.empty(0, np.uint8)] * self._size
        self._exchange(counts, nothing, nothing)

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        parts, received = partial_RPH.contiguous(), torch.empty_like(partial_RPH)
        sent, places = ([*_bytes(each).reshape(self._size, -1)] for each in (parts, received))
        self._exchange([len(partial_RPH)] * self._size, sent, places)
        places[self._rank][:] = sent[self._rank]
        return _sum(received, self._size, out)

    def all_reduce(self, partial_PH: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        return _sum(self.gather(partial_PH, counts=counts), self._size)

    def _exchange(self, counts: Sequence[int], sent: Sequence[_Bytes], places: Sequence[_Bytes]) -> None:
        """sent[r] goes to rank r, and what that sends to places[r], where all were told the same counts."""
        links = links_of(self._group)
        if links is None:
            raise AssertionError("the group's ranks are not connected")
        told = _bytes_of(counts).tobytes()
        heads = links.exchange(told, [each.data for each in sent], [each.data for each in places])
        if any(head != told for head in heads):
            check_counts([np.frombuffer(head, np.int64).tolist() for head in heads])


def check_counts(by_rank: Sequence[Sequence[int]]) -> None:
    """Raises TokensError where the ranks were told different counts: the same words on every rank."""
    first = by_rank[0]
    for rank, counts in enumerate(by_rank):
        if counts != first:
            raise TokensError(
                f"the ranks' counts of tokens differ: {_shown(first)} on rank 0 of the group, {_shown(counts)} on rank "
                f"{rank}; give every rank the same tokens_per_rank, or without it the same number of tokens"
            )


def _bytes(rows: torch.Tensor) -> _Bytes:
    return rows.reshape(-1).view(torch.uint8).numpy()


def _bytes_of(counts: Sequence[int]) -> _Bytes:
    return np.array(counts, np.int64).view(np.uint8)


def _room(ranks: int) -> int:
    """Bytes of the first message that is awaited from each other rank: the counts, and rows if there are few."""
    return max(len(_bytes_of([0] * ranks)), _AT_ONCE // max(1, ranks - 1))


def _shown(counts: Sequence[int]) -> str:
    return "a list that cannot be used" if min(counts) < 0 else str(list(counts))


def reduce_dtype_for(collectives: Collectives | None, tp_size: int, own: torch.dtype) -> torch.dtype:
    """The type in which partial sums travel where none is asked for: the tokens' `own`, or float32 for many ranks.

    Many is more than 8, where the collective adds in the type that travels.
    """
    rounds_often = not (collectives and collectives.in_float32) and tp_size > RANKS_IN_OWN_TYPE
    return torch.float32 if rounds_often else own


def _sum(rows_RPH: torch.Tensor, ranks: int, out: torch.Tensor | None = None) -> torch.Tensor:
    first, *others = rows_RPH.chunk(ranks)
    total = first.to(torch.float32, copy=True) if out is None else out.copy_(first)
    for other in others:
        total += other
    return total
