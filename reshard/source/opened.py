"""A file that stays the same while it is read: one descriptor for all of it, its identity told at both ends."""

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

MISSING = "missing"
"""Why a file is not there, where nothing stands in its place."""


class _Identity(NamedTuple):
    device: int
    inode: int
    size: int
    modified_ns: int


class Opened:
    """A file that is open for reading. Raises OSError. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without O_NONBLOCK the opening of a pipe waits for its other end.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise OSError(errno.EISDIR, "Is a directory" if stat.S_ISDIR(found.st_mode) else "Not a regular file")
        self._identity = _identity(found)

    @property
    def size(self) -> int:
        """In bytes, as it was opened."""
        return self._identity.size

    @property
    def same_file(self) -> str:
        """A path that opens this very file again, whatever has its name now."""
        return f"/proc/self/fd/{self.descriptor}"

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before."""
        chunks = []
        while start < stop and (chunk := os.pread(self.descriptor, stop - start, start)):
            chunks.append(chunk)
            start += len(chunk)
        return b"".join(chunks)

    def difference(self) -> str | None:
        """What of it is no longer as it was opened; None if nothing is."""
        first = self._identity
        if (now := _identity(os.fstat(self.descriptor))) != first:
            return f"was written to while it was read ({_shown(first)} at the start, now {_shown(now)})"
        try:
            now = _identity(self.path.stat())
        except OSError as error:
            return f"was taken away while it was read ({error.strerror})"
        return "was replaced by another file while it was read" if now != first else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let it go; what is mapped stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def reason(error: OSError) -> str:
    """Why a file could not be opened or read, in words."""
    if error.errno == errno.EMFILE:
        return "too many files are open; allow more with `ulimit -n`"
    return error.strerror or str(error)


def unfollowed(path: Path, error: OSError) -> str:
    """What a name is that leads to no file."""
    if not path.is_symlink():
        return f"not readable ({error.strerror})"
    link, place = os.readlink(path), os.path.realpath(path)
    if error.errno == errno.ELOOP:
        return f"a link to {link}, which leads back to itself"
    where = f"{place}, which" if link == place else f"{link} ({place}), which"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"a link to {where} is not there (is that disk mounted?)"
    return f"a link to {where} cannot be followed ({error.strerror})"


def _identity(found: os.stat_result) -> _Identity:
    return _Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _shown(identity: _Identity) -> str:
    return f"{identity.size} bytes, modified at {identity.modified_ns / 1e9:.6f}"
