"""A target: where a shard set is written, as files by name. A folder is one, an object store another.

To add one: a class with the methods of `Target`, and its scheme in reshard.writer.open.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from reshard.manifest import Shard
from reshard.model.naming import MANIFEST, ShardName, parse_shard_file
from reshard.quantization import is_side_file
from reshard.writer.file import DirectFile

Tick = Callable[[int], None]

LOCK_FILE = re.compile(r"\.reshard(-set|-rank-\d{5})?\.lock")
REPLACED = f".{MANIFEST}.replaced"
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_RECORD_ENDING = ".record.json"


class Target(Protocol):
    """Files by name. Safe to use from several threads. What goes wrong is an OutputError."""

    @property
    def address(self) -> str:
        """How messages call it."""

    def files(self) -> Mapping[str, int]:
        """Names and sizes, as they are now; none where nothing was written yet."""

    def writing(self, ranks: Sequence[int] | None) -> AbstractContextManager[Callable[[], bool]]:
        """The time in which these ranks (None: all) are written; nothing unfinished stays.

        Yields a call that says whether the set may be completed now: False if another run is known to write some of
        it. Raises BusyError if another run is known to write these ranks.
        """

    def check_room(self, names: Iterable[str], wanted: int) -> None:
        """Raises SpaceError if `wanted` bytes are known not to fit, OutputError if one of the files' names does not."""

    def create(self, name: str) -> DirectFile:
        """Begin a file that will be called `name`. Only while `writing`."""

    def publish(self, file: DirectFile, shard: Shard, tick: Tick) -> None:
        """Let a shard that was written be seen under its name. tick: called at each step, raises to end it."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def holds(self, shard: Shard, tick: Tick) -> bool:
        """Whether the shard that is there has the digest: it is read. tick: called at each step, raises to end it."""

    def put(self, name: str, data: bytes) -> None:
        """A small file, seen whole or not at all."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, durably; one that is not there is no error."""

    def remove_temporaries(self, ranks: Collection[int] | None) -> None:
        """Remove what killed runs left here of these ranks; with None, all of it."""


@dataclass(frozen=True)
class Contents:
    """What is in a target.

    finished: the manifest is there; replaced: an overwrite was cut off between two sets.
    """

    finished: bool
    replaced: bool
    shards: frozenset[ShardName]
    foreign: tuple[str, ...]


def contents(target: Target) -> Contents:
    """What the names in a target are."""
    names = sorted(target.files())
    shards = frozenset(parsed for name in names if (parsed := parse_shard_file(name)))
    of_a_set = bool(shards) or REPLACED in names
    return Contents(
        finished=MANIFEST in names and bool(shards),
        replaced=REPLACED in names,
        shards=shards,
        foreign=tuple(n for n in names if not (_is_ours(n) or (of_a_set and (n == MANIFEST or is_side_file(n))))),
    )


def take_manifest_away(target: Target) -> None:
    """From here on the set is one that is being replaced: no reader takes it, and `--resume` finishes it."""
    if MANIFEST in target.files():
        target.put(REPLACED, target.read(MANIFEST))
        target.remove([MANIFEST])


def record_file(shard: str) -> str:
    """The name of a finished shard's record in an unfinished set."""
    return shard.removesuffix(".safetensors") + _RECORD_ENDING


def stale(names: Iterable[str], keep: Collection[str]) -> list[str]:
    """Records, and what a set of another size or source left: of a finished set, all but what is to keep."""
    ours = (name for name in names if is_side_file(name) or rank_of(name) is not None)
    return [*(name for name in ours if name not in keep), REPLACED]


def rank_of(name: str) -> int | None:
    """The rank that a shard or a record is of."""
    shard = name.removesuffix(_RECORD_ENDING) + ".safetensors" if name.endswith(_RECORD_ENDING) else name
    parsed = parse_shard_file(shard)
    return parsed.tp_rank if parsed else None


def _is_ours(name: str) -> bool:
    passing = name == REPLACED or LOCK_FILE.fullmatch(name) or TEMPORARY.fullmatch(name)
    return bool(passing) or rank_of(name) is not None
