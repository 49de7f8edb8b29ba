"""A folder as target: temporary names, durable renames, locks."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from reshard.errors import OutputError, SpaceError
from reshard.limits import MANIFEST_BYTES
from reshard.manifest import Shard
from reshard.regular import TOO_MANY_OPEN, read_whole, unfollowed, unreadable, what_stands_there
from reshard.source.folder import FolderSource
from reshard.tensors.digests import file_digest
from reshard.writer.file import DirectFile, sync
from reshard.writer.lock import WriteLease
from reshard.writer.target import LOCK_FILE, TEMPORARY, Tick, rank_of

_RESERVE = 1 << 20  # for the manifest, records and folder entries


class OutputFolder:
    """A folder that a shard set is written into: a Target. A file has a name of its own until it is committed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._created: list[Path] = []
        self._temporaries: list[Path] = []

    @property
    def address(self) -> str:
        return str(self.path)

    def files(self) -> Mapping[str, int]:
        found = {}
        try:
            # What another run removes meanwhile is left out.
            for name in os.listdir(self.path):
                with contextlib.suppress(FileNotFoundError):
                    found[name] = (self.path / name).lstat()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; give a folder that can be written") from error
        for name, entry in sorted(found.items()):
            if what := what_stands_there(entry.st_mode):  # links too: nobody but us writes through them
                raise OutputError(f"{self.path}: holds {name}, which is {what}; choose an empty folder, or remove it")
        return {name: entry.st_size for name, entry in found.items()}

    @contextlib.contextmanager
    def writing(self, ranks: Sequence[int] | None) -> Iterator[Callable[[], bool]]:
        lease = WriteLease(self.path)
        try:
            with os_errors(self.path):
                self._make()
                try:
                    lease.acquire(ranks)
                    yield lease.finish
                finally:
                    lease.release()
        finally:
            self.remove_own_temporaries()
            for path in reversed(self._created):  # where nothing was put into what was made
                with contextlib.suppress(OSError):
                    path.rmdir()

    def require_empty(self) -> None:
        """Raises OutputError where there is anything but what killed runs leave."""
        there = [name for name in sorted(self.files()) if not (TEMPORARY.fullmatch(name) or LOCK_FILE.fullmatch(name))]
        if there:
            raise OutputError(f"{self.path}: holds {there[0]}; give a new or empty folder")

    def check_room(self, names: Iterable[str], wanted: int) -> None:
        longest = os.pathconf(self.path, "PC_NAME_MAX")
        for name in names:
            if (size := len(os.fsencode(_temporary(name)))) > longest:
                raise OutputError(
                    f"{self.path}: {name}: its name has {size} bytes with the ending that it has while it is written, "
                    f"the file system takes {longest}; give the source's file a shorter one"
                )
        # What they replace stays until they are written.
        check_space(self.path, wanted, "make room or choose another disk")

    def create(self, name: str) -> DirectFile:
        return DirectFile(self.temporary(name), name)

    def publish(self, file: DirectFile, shard: Shard, tick: Tick) -> None:
        file.commit()

    def temporary(self, name: str) -> Path:
        """A path of its own for a file that will be called `name`."""
        path = self.path / _temporary(name)
        self._temporaries.append(path)
        return path

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            return read_whole(path, MANIFEST_BYTES)
        except OSError as error:
            raise OutputError(unreadable(path, error)) from error

    def holds(self, shard: Shard, tick: Tick) -> bool:
        with FolderSource(self.path) as there:
            return file_digest(there, shard.file, shard.size, tick) == shard.blake3

    def remove_own_temporaries(self) -> None:
        """Remove what `temporary` named and nothing was made of."""
        while self._temporaries:
            with contextlib.suppress(OSError):  # a disk that failed: what it said first is what counts
                self._temporaries.pop().unlink(missing_ok=True)

    def remove_temporaries(self, ranks: Collection[int] | None) -> None:
        for match in filter(None, map(TEMPORARY.fullmatch, self.files())):
            if ranks is None or rank_of(match[1]) in ranks:
                (self.path / match[0]).unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> None:
        if os.path.lexists(self.path / name) and self.read(name) == data:
            return  # it is left alone
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

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        sync(self.path)

    def _make(self) -> None:
        """Make the folder and its parents, remembering which were not there."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError as error:
                if not path.is_dir():
                    raise OutputError(f"{path} is {unfollowed(path, error)}; give another folder") from error
                continue
            except OSError as error:
                raise OutputError(f"{path}: cannot be made: {error.strerror}") from error
            self._created.append(path)
            sync(path.parent)


def _temporary(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.tmp"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[OutputFolder]:
    """A folder that must be new or empty, locked; temporary files that are left when the block ends are removed."""
    folder = OutputFolder(path)
    folder.require_empty()
    with folder.writing(None):
        folder.require_empty()  # again, now that no other run can change it
        folder.remove_temporaries(None)
        yield folder


def check_space(folder: Path, wanted: int, way_out: str) -> None:
    """Raises SpaceError if `wanted` bytes do not fit on a folder's disk."""
    free = shutil.disk_usage(folder).free
    if wanted + _RESERVE > free:
        raise SpaceError(f"{folder}: {wanted:,} bytes are to be written, {free:,} are free; {way_out}")


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
        said = TOO_MANY_OPEN if error.errno == errno.EMFILE else error.strerror
        raise OutputError(f"{error.filename or path}: {said}") from error
