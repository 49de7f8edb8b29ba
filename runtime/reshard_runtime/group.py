"""What the ranks of a group must agree in, asked once, when a layer is made, and how what lasts holds the group."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from reshard.errors import GroupError
from reshard_runtime.shard import LayerShard


class HeldWeakly:
    """A process group that others keep: torch's own table does until `destroy_process_group`.

    Whoever destroys the group must be the last to hold it: only then does torch await its threads
    (`reshard_runtime.gloo_threads`).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._reference = weakref.ref(group)

    def __call__(self) -> dist.ProcessGroup:
        """Raises GroupError once it is gone."""
        group = self._reference()
        if group is None:
            raise GroupError(
                "the process group of this layer is gone: it was destroyed, or nothing holds it; make the layer again "
                "with a group that is there"
            )
        return group


def check_place(layer: LayerShard, group: dist.ProcessGroup | None) -> None:
    """Whether this process's place in the group is the shard's. Raises GroupError with both."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if size != layer.tp_size:
        given = "no group" if group is None else f"a group of {size}"
        raise GroupError(
            f"layer {layer.index}: its shard is one of {layer.tp_size}, and {given} was given; pass the group of the "
            f"{layer.tp_size} ranks that share the set"
        )
    if rank != layer.tp_rank:
        raise GroupError(f"layer {layer.index}: rank {layer.tp_rank}'s shard, and this is rank {rank} of the group")


@contextmanager
def agreement(*groups: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """What every rank does here, and puts into the dict, is compared over each of the groups in turn.

    Raises GroupError on every rank where a value differs on any. Where a rank raises, whatever it is, the others raise
    GroupError with its message: none is left waiting for it.
    """
    own: dict[str, Any] = {}
    problem: Exception | None = None
    try:
        yield own
    except Exception as error:
        problem = error
    for group in groups:
        try:
            _compare(group, own, problem)
        except Exception as error:
            problem = error
    if problem is not None:
        raise problem


def _compare(group: dist.ProcessGroup | None, own: Mapping[str, Any], problem: Exception | None) -> None:
    message = None if problem is None else str(problem) or type(problem).__name__
    said: list[tuple[Mapping[str, Any], str | None]] = [(own, message)]
    if group is not None and group.size() > 1:
        said = [said[0]] * group.size()
        dist.all_gather_object(said, (dict(own), message), group=group)
    if problem is not None:
        raise problem
    for rank, (_, theirs) in enumerate(said):
        if theirs is not None:
            raise GroupError(f"rank {rank} of the group failed: {theirs}")
    for rank, (settings, _) in enumerate(said):
        for key, value in said[0][0].items():
            if settings[key] != value:
                raise GroupError(f"{key} is {value!r} on rank 0 of the group and {settings[key]!r} on rank {rank}")
