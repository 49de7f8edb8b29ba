"""A file on this host, written past the page cache where the file system allows it.

So nothing waits in the page cache for the closing fsync, and memory does not grow.
"""

import errno
import fcntl
import os
from pathlib import Path

from reshard.plan.plan import ALIGNMENT


class DirectFile:
    """Writes a file that does not exist yet; it will be called `name`."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name
        self._descriptor = _create(path)
        self._written = 0

    def write(self, data: memoryview) -> None:
        """Append bytes, best from memory that is aligned to pages."""
        if len(data) % ALIGNMENT:
            _leave_direct(self._descriptor)  # only the file's tail is no whole number of pages
        while data:
            size = _write(self._descriptor, data, self._written)
            self._written += size
            data = data[size:]

    def close(self) -> None:
        """Make it durable."""
        os.fsync(self._descriptor)
        self._release()

    def commit(self) -> None:
        """Give it its name, durably."""
        self.path.replace(self.path.parent / self.name)
        sync(self.path.parent)

    def discard(self) -> None:
        """Close and remove the file."""
        self._release()
        self.path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sync(folder: Path) -> None:
    """Make a folder's renames and removals durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some file systems create it and then refuse direct writes
    return os.open(path, flags, 0o644)


def _write(descriptor: int, data: memoryview, at: int) -> int:
    try:
        return os.pwrite(descriptor, data, at)
    except OSError as error:
        # A file system may take the flag and still refuse this write; without the flag it is an ordinary one.
        if error.errno != errno.EINVAL or not _leave_direct(descriptor):
            raise
        return os.pwrite(descriptor, data, at)


def _leave_direct(descriptor: int) -> bool:
    """Go on with ordinary writes. False if they were so already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True
