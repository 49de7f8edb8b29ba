"""Who may write which ranks of a folder: a lock file for each rank, or one for the whole set.

The kernel's locks belong to the open file, so a killed run holds none, and runs of different ranks do not disturb each
other. Lock files are made, tried and removed under the folder's own lock, which is held for a moment, and while a set
is completed.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from reshard.errors import BusyError, OutputError

_WAIT_SECONDS = 600.0
_RELEASE_SECONDS = 5.0  # who completes the set meanwhile removes the files


class WriteLease:
    """The right to write some ranks of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".reshard.lock"
        self._own = FileLock(self._path)
        self._held: dict[Path, FileLock] = {}

    def acquire(self, ranks: Sequence[int] | None) -> None:
        """Take the ranks' locks, the set's if `ranks` is None. Raises BusyError if another run holds one."""
        the_set = self._folder / ".reshard-set.lock"
        with self._locked():
            if ranks is None:
                if not (self._is_alone() and self._take(the_set)):
                    raise self._busy("there")
                return
            for rank in ranks:
                if not (self._is_free(the_set) and self._take(self._folder / f".reshard-rank-{rank:05d}.lock")):
                    raise self._busy(f"rank {rank} there")

    def finish(self) -> bool:
        """Exchange the ranks for the right to complete the set. False if another run is still writing some of it.

        Of several runs that end together the last one gets the right, since each has let go of its ranks before.
        """
        with self._locked():
            if self._is_alone():
                self._own.acquire()  # once more: it is held until `release`
                return True
            self._let_go()
            return False

    def release(self) -> None:
        """Let go; the last one out removes the files."""
        try:
            with contextlib.suppress(OSError, OutputError), self._locked(_RELEASE_SECONDS):
                for path in self._files():
                    if path in self._held or self._is_free(path):
                        path.unlink()
                if not self._files():
                    self._path.unlink()
        finally:
            self._let_go()
            self._own.release(force=True)

    def _files(self) -> list[Path]:
        return list(self._folder.glob(".reshard-*.lock"))

    def _is_alone(self) -> bool:
        return all(self._is_free(path) for path in self._files() if path not in self._held)

    def _is_free(self, path: Path) -> bool:
        if not path.exists():
            return True
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False

    def _take(self, path: Path) -> bool:
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[path] = lock
        return True

    def _let_go(self) -> None:
        while self._held:
            self._held.popitem()[1].release()

    def _busy(self, what: str) -> BusyError:
        return BusyError(f"{self._folder}: another run is writing {what}; wait for it, or choose another folder")

    @contextlib.contextmanager
    def _locked(self, seconds: float = _WAIT_SECONDS) -> Iterator[None]:
        """Hold the folder's own lock."""
        try:
            while True:
                self._path.touch()
                before = _inode(self._path)
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)  # a file in a lock's place outlives a killed run
                    self._own.acquire(timeout=seconds)
                if before is not None and _inode(self._path) == before:
                    break
                self._own.release()  # a run that ended removed the file between our opening and our locking
        except Timeout as error:
            raise BusyError(
                f"{self._folder}: another run has been completing the set for {seconds:.0f} s; wait for it"
            ) from error
        except (OSError, NotImplementedError, UserWarning) as error:
            if getattr(error, "filename", None):
                raise
            raise OutputError(
                f"{self._path}: cannot be locked: {error}; choose a folder on another file system"
            ) from error
        try:
            yield
        finally:
            self._own.release()


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
