"""Who may write which ranks of a folder: byte-range locks on one small file, byte r for rank r.

The locks belong to the open file, so a killed run holds none, and runs of different ranks do not disturb each other.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from reshard.errors import BusyError, OutputError
from reshard.writer.target import LOCK_FILE

_TURN = 1 << 40  # a byte behind every rank's: held only while ranks are taken, and while the manifest is written
_REST_OF_FILE = 0


@contextlib.contextmanager
def locked(folder: Path, ranks: Sequence[int] | None) -> Iterator["Lock"]:
    """Hold the ranks' bytes, all of the file if `ranks` is None. Raises BusyError if another run holds one."""
    lock = Lock(folder)
    try:
        lock.acquire(ranks)
        yield lock
    finally:
        lock.release()


class Lock:
    """An open lock file."""

    exclusive = True

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._descriptor = -1

    def acquire(self, ranks: Sequence[int] | None) -> None:
        """Take the ranks' bytes or raise BusyError."""
        while True:
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._lock(fcntl.F_WRLCK, _TURN, 1, wait=True)
            if self._is_current():
                break
            os.close(self._descriptor)  # a finished run removed the file between our opening and our locking
        for start, length in [(0, _TURN)] if ranks is None else [(rank, 1) for rank in ranks]:
            if not self._lock(fcntl.F_WRLCK, start, length):
                what = "there" if ranks is None else f"rank {start} there"
                raise BusyError(
                    f"{self._path.parent}: another run is writing {what}; wait for it, or choose another folder"
                )
        self._lock(fcntl.F_UNLCK, _TURN, 1)

    def finish(self) -> bool:
        """Exchange the ranks for the right to complete the set. False if a run is still writing some of it.

        Of several runs that end together the last one gets the right, since each has let go of its ranks before.
        """
        self._lock(fcntl.F_UNLCK, 0, _TURN)
        self._lock(fcntl.F_WRLCK, _TURN, 1, wait=True)
        return self._lock(fcntl.F_WRLCK, 0, _TURN)

    def release(self) -> None:
        """Let go; the last one out removes the file."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError, OutputError):
            self._lock(fcntl.F_UNLCK, 0, _REST_OF_FILE)
            if self._lock(fcntl.F_WRLCK, 0, _REST_OF_FILE) and self._is_current():
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _lock(self, kind: int, start: int, length: int, *, wait: bool = False) -> bool:
        """False if another run holds some of it. The request is C's `struct flock`."""
        request = struct.pack("@hhqqi0q", kind, os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise OutputError(f"{self._path}: cannot be locked: {error.strerror}") from error
        return True
