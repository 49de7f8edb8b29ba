"""The groups that share the dense layers: consecutive data-parallel ranks, each with all its tensor-parallel ranks."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from reshard.errors import GroupError
from reshard_runtime.group import HeldWeakly

T = TypeVar("T")
_FAILURE = "denseffn_shards/failure"
_STORE_ERRORS = (AttributeError, RuntimeError)  # an older torch shows no store; it goes with the process that held it


class Group:
    """The ranks that share the dense layers, as this process meets them.

    data: those of the data-parallel ranks that share them, at this process's place in all other parallelism.
    tensor: its tensor-parallel ranks. first: the data-parallel rank of the first of `data`.
    """

    def __init__(self, data: dist.ProcessGroup, tensor: dist.ProcessGroup, first: int) -> None:
        self._data, self._tensor, self.first = HeldWeakly(data), HeldWeakly(tensor), first

    @property
    def data(self) -> dist.ProcessGroup:
        """Raises GroupError once it is gone, as `tensor` does."""
        return self._data()

    @property
    def tensor(self) -> dist.ProcessGroup:
        """Of one rank, without tensor parallelism."""
        return self._tensor()

    @property
    def rank(self) -> int:
        """The process's place: the tp_rank of its shard."""
        return self.data.rank() * self.tensor.size() + self.tensor.rank()

    @property
    def size(self) -> int:
        """tp_size."""
        return self.data.size() * self.tensor.size()

    def meet(self, collective: Callable[..., T], *args: Any) -> T:
        """A collective's result. Raises GroupError where another rank has left, with what that one has told."""
        try:
            return collective(*args)
        except RuntimeError as error:
            raise GroupError(f"{self._told()} ({error})") from error

    def tell(self, message: str) -> None:
        """Leave the others word of why this rank does not come to a collective."""
        with contextlib.suppress(*_STORE_ERRORS):
            self.data.get_group_store().set(_FAILURE, f"rank {self.data.rank()} of the group failed: {message}")

    def _told(self) -> str:
        with contextlib.suppress(*_STORE_ERRORS):
            store = self.data.get_group_store()
            if store.check([_FAILURE]):
                return str(store.get(_FAILURE), "utf-8")
        return "another rank of the group has left, its own log says why"


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


def make_group(ranks: Sequence[int], data: dist.ProcessGroup, tensor: dist.ProcessGroup, size: int) -> Group:
    """The process's group of tp_size `size`; `ranks`: its data-parallel group's, which `data` stands for.

    Of that group as many consecutive ranks as it takes with their tensor-parallel ranks; all of it, where it takes
    all. Else every process of the job must call it: making groups is collective, and every process makes all of them,
    in one order.
    """
    wanted = size // tensor.size()
    if wanted == len(ranks):
        return Group(data, tensor, 0)
    everyone: list[Sequence[int]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, tuple(ranks), group=dist.new_group(backend="gloo"))
    made: dict[int, dist.ProcessGroup] = {}
    for chunk in chunks(everyone, wanted):
        made |= dict.fromkeys(chunk, dist.new_group(chunk, backend=dist.get_backend(data)))
    own = list(ranks).index(dist.get_rank())
    return Group(made[dist.get_rank()], tensor, own - own % wanted)
