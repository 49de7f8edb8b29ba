"""A local file by name that must be a regular file: opened without waiting, through one descriptor for all of it.

A FIFO, a device or a folder in its place is told, not read: the one may have no end, the other no beginning.
"""

import errno
import os
import stat
import weakref
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

MISSING = "missing"
"""Why a file is not there, where nothing stands in its place."""

TOO_MANY_OPEN = "too many files are open; allow more with `ulimit -n`"

_PIECE = 1 << 26  # read at once; a signal is answered between two
_READ_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotAFileError(OSError):
    """Something else than a file stands there, or more than may be read of one; `strerror` says what."""


class Identity(NamedTuple):
    """What tells a file from any other, and from itself once it was written to, while it is open."""

    device: int
    inode: int
    size: int
    modified_ns: int


class Opened:
    """A regular file that is open for reading. Raises OSError. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _require_file(path.stat())  # a device is not even opened
            # Without O_NONBLOCK the opening of a FIFO that has just taken its place waits for the other end.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except ValueError as error:  # a zero byte, or half a character
            raise OSError(errno.EINVAL, f"no file can have this name ({error})") from error
        self.close = weakref.finalize(self, os.close, self._descriptor)  # at the latest when nothing refers to it
        self.close.atexit = False  # not while a thread still reads
        found = os.fstat(self._descriptor)
        _require_file(found)
        self.identity = _identity(found)

    def fileno(self) -> int:
        """The descriptor, which is closed with this object: keep that as long."""
        return self._descriptor

    @property
    def size(self) -> int:
        """In bytes, as it was opened."""
        return self.identity.size

    @property
    def same_file(self) -> str:
        """A path that opens this very file again, whatever has its name now."""
        return f"/proc/self/fd/{self._descriptor}"

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the file ends before."""
        chunks = []
        while start < stop and (chunk := os.pread(self._descriptor, min(_READ_BYTES, stop - start), start)):
            chunks.append(chunk)
            start += len(chunk)
        return b"".join(chunks)

    def fill(self, into: memoryview, start: int) -> int:
        """Bytes from `start` on into memory: how many, fewer than it has room for where the file ends before."""
        filled = 0
        while filled < len(into):
            count = os.preadv(self._descriptor, [into[filled : filled + _PIECE]], start + filled)
            if count == 0:
                break
            filled += count
        return filled

    def difference(self) -> str | None:
        """What of it is no longer as it was opened; None if nothing is."""
        first = self.identity
        if (now := _identity(os.fstat(self._descriptor))) != first:
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


def is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a broken link. Of what may not be looked at it is said when it is opened."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def read_whole(path: Path, most: int) -> bytes:
    """All bytes of a file. Raises OSError, as NotAFileError where there are more than `most`."""
    with Opened(path) as opened:
        size = opened.size
        raw = opened.read(0, most + 1) if size <= most else b""  # to its end: /proc says 0 of its files
    if max(size, len(raw)) > most:
        raise NotAFileError(errno.EFBIG, f"has {max(size, len(raw)):,} bytes, expected at most {most:,}")
    return raw


def unreadable(path: Path, error: OSError, way: str = "") -> str:
    """Why a file could not be opened or read: a line that begins with its path. way: out, where a file is there."""
    if isinstance(error, NotAFileError):
        return f"{path} {error.strerror}"
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path} is {unfollowed(path, error)}"
    if error.errno == errno.EMFILE:
        return f"{path}: cannot be read: {TOO_MANY_OPEN}"
    return f"{path}: cannot be read: {error.strerror or error}{way and '; '}{way}"


def unfollowed(path: Path, error: OSError) -> str:
    """What a name is that leads to no file."""
    if not os.path.islink(path):
        return f"not readable ({error.strerror})"
    link, place = os.readlink(path), os.path.realpath(path)
    if error.errno == errno.ELOOP:
        return f"a link to {link}, which leads back to itself"
    where = f"{place}, which" if link == place else f"{link} ({place}), which"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"a link to {where} is not there (is that disk mounted?)"
    return f"a link to {where} cannot be followed ({error.strerror})"


def what_stands_there(mode: int) -> str | None:
    """What an entry of a folder is that is no file; None if it is one."""
    return None if stat.S_ISREG(mode) else f"{_KINDS.get(stat.S_IFMT(mode), 'no file')}, expected a file"


def _require_file(found: os.stat_result) -> None:
    if what := what_stands_there(found.st_mode):
        raise NotAFileError(errno.EINVAL, f"is {what}")


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _shown(identity: Identity) -> str:
    return f"{identity.size} bytes, modified at {identity.modified_ns / 1e9:.6f}"
