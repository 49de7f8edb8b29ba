"""Where a shard set is written: what a target offers, and whose its names are.

A folder is one, an object store another; the split knows nothing of what stands behind it.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from reshard.manifest import Record
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.source.files import is_side_file

LOCK_FILE = ".reshard.lock"
REPLACED = f".{MANIFEST}.replaced"
TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_RECORD_ENDING = ".record.json"


@dataclass(frozen=True)
class Contents:
    """What stands in a target.

    finished: the manifest is there; replaced: an overwrite was cut off between two sets; shards: (rank, size).
    """

    finished: bool
    replaced: bool
    shards: frozenset[tuple[int, int]]
    temporaries: tuple[str, ...]
    foreign: tuple[str, ...]


class Sink(Protocol):
    """A file that is being written, front to back."""

    def write(self, data: memoryview) -> None:
        """Append bytes."""

    def close(self) -> None:
        """Make what was written durable."""

    def commit(self) -> str | None:
        """Let the closed file be seen. Returns what its store calls these very bytes (an S3 ETag), if it does."""

    def discard(self) -> None:
        """Give it up: nothing of it stays."""


class Turn(Protocol):
    """The right to write some ranks."""

    @property
    def exclusive(self) -> bool:
        """Whether no other run can write these ranks meanwhile."""

    def finish(self) -> bool:
        """Exchange it for the right to complete the set. False if another run is still writing some of it."""


class Target(Protocol):
    """Files by name. Safe to use from several threads."""

    @property
    def address(self) -> str:
        """How messages call it."""

    @property
    def stages(self) -> bool:
        """Whether a closed file stays unseen until it is committed."""

    def contents(self) -> Contents:
        """Look at what is there. Raises OutputError where nothing can be written."""

    def writing(self, ranks: Sequence[int] | None) -> AbstractContextManager[Turn]:
        """The time in which these ranks (None: all) are written: what killed runs left of them is removed.

        What goes wrong is an OutputError; nothing unfinished stays. Raises BusyError if another run is known to
        write there.
        """

    def check_space(self, wanted: int) -> None:
        """Raises SpaceError if `wanted` bytes are known not to fit."""

    def create(self, name: str, size: int) -> Sink:
        """Begin a file that will be called `name` and have `size` bytes."""

    def files(self) -> Mapping[str, int]:
        """Names and sizes, as they are now."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def holds(self, record: Record) -> bool:
        """Whether a shard that is there is the recorded one, by what can be known of it without fetching it."""

    def put(self, name: str, data: bytes) -> None:
        """A small file, seen whole or not at all; one that holds that already may be left alone."""

    def take_manifest_away(self) -> None:
        """From here on the set is one that is being replaced: no reader takes it, and `--resume` finishes it."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, durably; one that is not there is no error."""

    def remove_temporaries(self, ranks: Collection[int | None] | None) -> None:
        """Remove what killed runs left of these ranks, None among them for what is of no rank; with None, all of it."""


def record_file(shard: str) -> str:
    """The name of a finished shard's record in an unfinished set."""
    return shard.removesuffix(".safetensors") + _RECORD_ENDING


def sort_names(names: Iterable[str]) -> Contents:
    """What the names in a target are."""
    names = sorted(names)
    shards = frozenset(parsed for name in names if (parsed := parse_shard_file(name)))
    of_a_set = bool(shards) or REPLACED in names
    return Contents(
        finished=MANIFEST in names and bool(shards),
        replaced=REPLACED in names,
        shards=shards,
        temporaries=tuple(name for name in names if TEMPORARY.fullmatch(name)),
        foreign=tuple(n for n in names if not (_is_ours(n) or (of_a_set and (n == MANIFEST or is_side_file(n))))),
    )


def stale(names: Iterable[str], keep: Collection[str]) -> list[str]:
    """Records, and what a set of another size or source left: of a finished set, all but what is to keep."""
    ours = (name for name in names if is_side_file(name) or rank_of(name) is not None)
    return [*(name for name in ours if name not in keep), REPLACED]


def rank_of(name: str) -> int | None:
    """The rank that a shard or a record is of."""
    shard = name.removesuffix(_RECORD_ENDING) + ".safetensors" if name.endswith(_RECORD_ENDING) else name
    parsed = parse_shard_file(shard)
    return parsed[0] if parsed else None


def _is_ours(name: str) -> bool:
    return name in {REPLACED, LOCK_FILE} or bool(TEMPORARY.fullmatch(name)) or rank_of(name) is not None
