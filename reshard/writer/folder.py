"""A folder as target: temporary names, durable renames, locks."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from reshard.errors import OutputError, SpaceError
from reshard.manifest import Record
from reshard.model.naming import MANIFEST
from reshard.source.folder import FolderSource
from reshard.tensors.digests import file_digest
from reshard.writer.file import DirectFile, sync
from reshard.writer.lock import Lock, locked
from reshard.writer.target import LOCK_FILE, REPLACED, TEMPORARY, Contents, rank_of, sort_names

_RESERVE = 1 << 20  # for the manifest, records and folder entries


class OutputFolder:
    """A folder that a shard set is written into."""

    stages = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._created: list[Path] = []
        self._temporaries: list[Path] = []

    @property
    def address(self) -> str:
        """The path."""
        return str(self.path)

    def contents(self) -> Contents:
        """Look at what is there. Raises OutputError if it is no folder."""
        try:
            names = sorted(os.listdir(self.path))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; give a folder that can be written") from error
        return sort_names(names)

    @contextlib.contextmanager
    def writing(self, ranks: Sequence[int] | None) -> Iterator[Lock]:
        """The folder made, and the ranks' locks held; what is left unfinished is removed."""
        try:
            with os_errors(self.path):
                self.make()
            with os_errors(self.path), locked(self.path, ranks) as lock:
                yield lock
        finally:
            self.remove_own_temporaries()
            self.remove_if_created()

    def require_empty(self) -> None:
        """Raises OutputError where there is anything but what killed runs leave."""
        contents = self.contents()
        names = os.listdir(self.path) if self.path.exists() else []
        there = sorted(set(names) - {*contents.temporaries, LOCK_FILE})
        if there:
            raise OutputError(f"{self.path}: holds {there[0]}; give a new or empty folder")

    def make(self) -> None:
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
            sync(path.parent)

    def remove_if_created(self) -> None:
        """Undo `make` where nothing was put into what it made."""
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

    def create(self, name: str, size: int) -> DirectFile:
        """Begin a file; it has a name of its own until it is committed."""
        return DirectFile(self.temporary(name), name)

    def temporary(self, name: str) -> Path:
        """A path of its own for a file that will be called `name`."""
        path = self.path / f".{name}.{secrets.token_hex(8)}.tmp"
        self._temporaries.append(path)
        return path

    def files(self) -> Mapping[str, int]:
        """Names and sizes, as they are now; what another run removes meanwhile is left out."""
        found = {}
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        """A small file."""
        with FolderSource(self.path) as there:
            return there.read(name, 0, self.files()[name])

    def holds(self, record: Record) -> bool:
        """Whether the shard has the recorded digest: it is read."""
        with FolderSource(self.path) as there:
            return file_digest(there, record.shard.file, 0, record.shard.size) == record.shard.blake3

    def remove_own_temporaries(self) -> None:
        """Remove what `temporary` named and nothing was made of."""
        while self._temporaries:
            with contextlib.suppress(OSError):  # a disk that failed: what it said first is what counts
                self._temporaries.pop().unlink(missing_ok=True)

    def remove_temporaries(self, ranks: Collection[int | None] | None) -> None:
        """Remove what killed runs left of these ranks, None among them for what is of no rank; with None, all of it."""
        for name in self.contents().temporaries:
            match = TEMPORARY.fullmatch(name)
            rank = rank_of(match[1]) if match else None
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
        self.rename(temporary, name)

    def rename(self, temporary: Path, name: str) -> None:
        """Give a durable file its name."""
        temporary.replace(self.path / name)
        sync(self.path)

    def take_manifest_away(self) -> None:
        """From here on the set is one that is being replaced: no reader takes it, and `--resume` finishes it."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / MANIFEST).replace(self.path / REPLACED)
            sync(self.path)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, durably."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        sync(self.path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[OutputFolder]:
    """A folder that must be new or empty, locked; temporary files that are left when the block ends are removed."""
    folder = OutputFolder(path)
    folder.require_empty()
    try:
        with os_errors(path):
            folder.make()
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
