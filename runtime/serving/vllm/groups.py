"""The groups that share the dense layers: consecutive data-parallel ranks, at one place in all other parallelism."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from reshard.errors import GroupError


@dataclass(frozen=True)
class Group:
    """`device` moves tensors, `host` objects. `first`: the data-parallel rank of its rank 0."""

    device: dist.ProcessGroup
    host: dist.ProcessGroup
    first: int

    @property
    def rank(self) -> int:
        """The process's place: the tp_rank of its shard."""
        return self.device.rank()

    @property
    def size(self) -> int:
        """tp_size."""
        return self.device.size()


def chunks(data_parallel_groups: Iterable[Sequence[int]], size: int) -> list[list[int]]:
    """Every data-parallel group's ranks, in their order, `size` by `size`: the same list whoever asks.

    Raises GroupError where the groups overlap or are no multiples of `size`.
    """
    groups = sorted({tuple(ranks) for ranks in data_parallel_groups})
    everyone = [rank for ranks in groups for rank in ranks]
    if len(set(everyone)) != len(everyone):
        raise GroupError(f"the engine's data-parallel groups overlap: {groups}")
    for ranks in groups:
        if len(ranks) % size:
            raise GroupError(f"a data-parallel group has {len(ranks)} ranks, which {size} does not divide: {ranks}")
    return [list(ranks[at : at + size]) for ranks in groups for at in range(0, len(ranks), size)]


def make_group(ranks: Sequence[int], device: dist.ProcessGroup, host: dist.ProcessGroup, size: int) -> Group:
    """The process's group of `size` ranks of its data-parallel group, `ranks`, which `device` and `host` stand for.

    That group itself where the sizes are equal. Else every process of the job must call it: making groups is
    collective, and every process makes all of them, in one order.
    """
    if size == len(ranks):
        return Group(device, host, 0)
    everyone: list[Sequence[int]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, tuple(ranks), group=dist.new_group(backend="gloo"))
    made: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup, int]] = {}
    for chunk in chunks(everyone, size):
        pair = dist.new_group(chunk, backend=dist.get_backend(device)), dist.new_group(chunk, backend="gloo")
        made |= dict.fromkeys(chunk, (*pair, list(ranks).index(chunk[0]) if chunk[0] in ranks else 0))
    return Group(*made[dist.get_rank()])
