"""How tokens and partial sums travel over a group. The same calls with the same sizes on every rank.

Shapes: P tokens of a rank, padded to the same number everywhere; R ranks; W what a token is on the way (H values, or
H bytes and a scale); H hidden_size.
"""

import torch
import torch.distributed as dist

from reshard.tensors.dtypes import RANKS_IN_OWN_TYPE

# torch 2.13 renamed them, and warns of the names that torch before it has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """By the collectives of the group's backend (hccl, nccl), which add in the type that travels.

    `out`: where the result is to stand, of its shape and type; a new tensor without.
    """

    in_float32 = False
    """Whether sums are added in float32, whatever type they travel in."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def gather(self, rows_PW: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Every rank's rows, by rank: [R*P, W]."""
        if out is None:
            out = rows_PW.new_empty(len(rows_PW) * self._group.size(), rows_PW.shape[1])
        _all_gather(out, rows_PW, group=self._group)
        return out

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over the ranks of this rank's rows of [R*P, H]: [P, H]."""
        if out is None:
            out = partial_RPH.new_empty(len(partial_RPH) // self._group.size(), partial_RPH.shape[1])
        _reduce_scatter(out, partial_RPH, group=self._group)
        return out

    def all_reduce(self, partial_PH: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks: [P, H]."""
        dist.all_reduce(partial_PH, group=self._group)
        return partial_PH


class PairwiseCollectives(Collectives):
    """gloo's: every rank sends every other its rows, which adds them itself, in float32 and in the order of the ranks.

    gloo's own reduce_scatter adds in the type that travels and took 1.1 to 5 times as long (2 and 4 processes, 1 to
    64 tokens of 7168).
    """

    in_float32 = True

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        received = torch.empty_like(partial_RPH)
        dist.all_to_all_single(received, partial_RPH, group=self._group)
        return _sum(received, self._group.size(), out)

    def all_reduce(self, partial_PH: torch.Tensor) -> torch.Tensor:
        return _sum(self.gather(partial_PH), self._group.size())


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
