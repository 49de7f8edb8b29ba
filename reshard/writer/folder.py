"""The output folder: what it holds, temporary names, durable renames."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import OutputError, SpaceError
from reshard.naming import CONFIG, MANIFEST, parse_shard_file
from reshard.source.files import is_description
from reshard.writer.lock import LOCK_FILE, locked

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
_RECORD_ENDING = ".record.json"
REPLACED = f".{MANIFEST}.replaced"
_RESERVE = 1 << 20  # for the manifest, records and folder entries


def record_file(shard: str) -> str:
    """The name of a finished shard's record in an unfinished set."""
    return shard.removesuffix(".safetensors") + _RECORD_ENDING


@dataclass(frozen=True)
class Contents:
    """What stands in an output folder.

    finished: the manifest is there; replaced: an overwrite was cut off between two sets; shards: (rank, size).
    """

    finished: bool
    replaced: bool
    shards: frozenset[tuple[int, int]]
    temporaries: tuple[str, ...]
    foreign: tuple[str, ...]


class OutputFolder:
    """A folder that a shard set is written into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._created: list[Path] = []
        self._temporaries: list[Path] = []

    def contents(self) -> Contents:
        """Look at what is there. Raises OutputError if it is no folder."""
        try:
            names = sorted(os.listdir(self.path))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; give a folder that can be written") from error
        shards = frozenset(parsed for name in names if (parsed := parse_shard_file(name)))
        return Contents(
            finished=MANIFEST in names and bool(shards),
            replaced=REPLACED in names,
            shards=shards,
            temporaries=tuple(name for name in names if _TEMPORARY.fullmatch(name)),
            foreign=tuple(n for n in names if not (_is_ours(n) or (shards and (n == MANIFEST or _is_side_file(n))))),
        )

    def require_empty(self) -> None:
        """Raises OutputError where there is anything but what killed runs leave."""
        contents = self.contents()
        names = os.listdir(self.path) if self.path.exists() else []
        there = sorted(set(names) - {*contents.temporaries, LOCK_FILE})
        if there:
            raise OutputError(f"{self.path}: holds {there[0]}; give a new or empty folder")

    def create(self) -> None:
        """Make the folder and its parents, remembering which were not there."""
        missing = []
        path = self.path
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(f"{path}: cannot be made: {error.strerror}") from error
            self._created.append(path)
            _sync(path.parent)

    def remove_if_created(self) -> None:
        """Undo `create` where nothing was put into what it made."""
        for path in reversed(self._created):
            with contextlib.suppress(OSError):
                path.rmdir()

    def check_space(self, wanted: int) -> None:
        """Raises SpaceError if `wanted` bytes do not fit. What they replace stays until they are written."""
        free = shutil.disk_usage(self.path).free
        if wanted + _RESERVE > free:
            raise SpaceError(
                f"{self.path}: {wanted:,} bytes are to be written, {free:,} are free; make room or choose another disk"
            )

    def temporary(self, name: str) -> Path:
        """A path of its own for a file that will be called `name`."""
        path = self.path / f".{name}.{secrets.token_hex(8)}.tmp"
        self._temporaries.append(path)
        return path

    def remove_own_temporaries(self) -> None:
        """Remove what `temporary` named and nothing was made of."""
        while self._temporaries:
            self._temporaries.pop().unlink(missing_ok=True)

    def remove_temporaries(self, ranks: Collection[int | None] | None) -> None:
        """Remove what killed runs left of these ranks, None among them for what is of no rank; with None, all of it."""
        for name in self.contents().temporaries:
            match = _TEMPORARY.fullmatch(name)
            rank = _rank_of(match[1]) if match else None
            if ranks is None or rank in ranks:
                (self.path / name).unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """A small file: written aside, made durable, renamed; one that holds that already is left alone."""
        with contextlib.suppress(FileNotFoundError):
            if (self.path / name).read_bytes() == data:
                return
        temporary = self.temporary(name)
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self.commit(temporary, name)

    def commit(self, temporary: Path, name: str) -> None:
        """Give a durable file its name."""
        temporary.replace(self.path / name)
        self.sync()

    def remove_stale(self, keep: Collection[str]) -> None:
        """Remove records, and what a set of another size or source left."""
        ours = [name for name in os.listdir(self.path) if _is_side_file(name) or _rank_of(name) is not None]
        self.remove([*(name for name in ours if name not in keep), REPLACED])

    def take_manifest_away(self) -> None:
        """From here on the set is one that is being replaced: no reader takes it, and `--resume` finishes it."""
        (self.path / MANIFEST).replace(self.path / REPLACED)
        self.sync()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, durably."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        self.sync()

    def sync(self) -> None:
        """Make renames and removals durable."""
        _sync(self.path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_side_file(name: str) -> bool:
    return name == CONFIG or is_description(name)


def _is_ours(name: str) -> bool:
    return name in {REPLACED, LOCK_FILE} or bool(_TEMPORARY.fullmatch(name)) or _rank_of(name) is not None


def _rank_of(name: str) -> int | None:
    """The rank that a shard or a record is of."""
    shard = name.removesuffix(_RECORD_ENDING) + ".safetensors" if name.endswith(_RECORD_ENDING) else name
    parsed = parse_shard_file(shard)
    return parsed[0] if parsed else None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[OutputFolder]:
    """A folder that must be new or empty, locked; temporary files that are left when the block ends are removed."""
    folder = OutputFolder(path)
    folder.require_empty()
    try:
        with os_errors(path):
            folder.create()
        with os_errors(path), locked(path, None):
            folder.require_empty()  # again, now that no other run can change it
            folder.remove_temporaries(None)
            yield folder
    finally:
        folder.remove_own_temporaries()
        folder.remove_if_created()


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses, as one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(
                f"{path}: the disk is full ({error.strerror}); temporary files are removed: make room and try again "
                "(a split goes on with --resume)"
            ) from error
        raise OutputError(f"{error.filename or path}: {error.strerror}") from error
