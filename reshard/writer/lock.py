"""Who may write which ranks of a folder: a lock file for each rank, or one for the whole set.

The kernel's locks belong to the open file, so a killed run holds none, and runs of different ranks do not disturb each
other. Lock files are made, tried and removed under the folder's own lock, which is held for a moment, and while a set
is completed. A link in a lock's place is not followed: what it leads to is another's.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reshard.errors import BusyError, OutputError

_WAIT_SECONDS = 600.0
_RELEASE_SECONDS = 5.0  # who completes the set meanwhile removes the files
_ASK_SECONDS = 0.05


class WriteLease:
    """The right to write some ranks of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".reshard.lock"
        self._held: dict[Path, int] = {}  # descriptors

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
        with self._locked() as own:
            if self._is_alone():
                self._held[self._path] = os.dup(own)  # until `release`
                return True
            self._let_go()
            return False

    def release(self) -> None:
        """Let go; the last one out removes the files."""
        with contextlib.ExitStack() as ended:
            ended.callback(self._let_go)
            with contextlib.suppress(OSError, OutputError):
                if self._path not in self._held:
                    ended.enter_context(self._locked(_RELEASE_SECONDS))
                for path in self._files():
                    if path in self._held or self._is_free(path):
                        path.unlink()
                if not self._files():
                    self._path.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob(".reshard-*.lock"))

    def _is_alone(self) -> bool:
        return all(self._is_free(path) for path in self._files() if path not in self._held)

    def _is_free(self, path: Path) -> bool:
        if not os.path.lexists(path):
            return True
        if taken := self._take(path):
            os.close(self._held.pop(path))
        return taken

    def _take(self, path: Path) -> bool:
        descriptor = _open(path)
        if taken := _lock(descriptor, path):
            self._held[path] = descriptor
        else:
            os.close(descriptor)
        return taken

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])

    def _busy(self, what: str) -> BusyError:
        return BusyError(f"{self._folder}: another run is writing {what}; wait for it, or choose another folder")

    @contextlib.contextmanager
    def _locked(self, seconds: float = _WAIT_SECONDS) -> Iterator[int]:
        """Hold the folder's own lock, an open file's."""
        deadline = time.monotonic() + seconds
        while True:
            descriptor = _open(self._path)
            try:
                while not (taken := _lock(descriptor, self._path)) and time.monotonic() < deadline:
                    time.sleep(_ASK_SECONDS)
                if not taken:
                    raise BusyError(
                        f"{self._folder}: another run has been completing the set for {seconds:.0f} s; wait for it"
                    )
                # Else a run that ended removed the file between our opening and our locking.
                if _is_open(self._path, descriptor):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)


def _open(path: Path) -> int:
    """A lock file. Raises OSError, also for a link; nothing waits for a FIFO's other end."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether nobody else has the lock, which then is ours until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked: {error}; choose a folder on another file system") from error
    return True


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether a name is still an open file's."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
