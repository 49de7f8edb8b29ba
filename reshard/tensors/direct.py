"""Reading past the page cache what is read once.

For the cache the kernel finds memory for every page, copies out of it, and drives out what else the host holds there.
But what is in the cache already, such as a file that was just downloaded, is not read from the disk again.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import threading
import weakref

import numpy as np

from reshard.tensors.memory import Bytes, Memory

BLOCK = 4096  # of every disk: where a direct read begins, and its length, are multiples
_LEAST = 1 << 17  # bytes; for fewer, one wait for the disk costs more than the cache
_PIECE = 1 << 20  # read at once, and copied while it is in the processor's cache
_REGION = 1 << 27  # that is in the cache, or not: far more than the kernel reads ahead of what is asked for
_BOUNCE = Memory()
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class DirectReader:
    """Reads an open file of which `size` bytes are mapped at `address`. Safe to use from several threads.

    descriptor: stays open as long as this object is used.
    """

    def __init__(self, descriptor: int, address: int, size: int) -> None:
        self._descriptor = descriptor
        self._address = address
        self._size = size
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._refused = not address
        self._cached: dict[int, bool] = {}

    def read(self, out: Bytes, start: int) -> int:
        """Fill `out` [bytes] with the file's bytes from `start` on.

        Returns how many; those behind them are to be read through the page cache.
        """
        stop, done = start + out.size, 0
        if out.size < _LEAST or stop > self._size or self._refused or self._is_cached(start):
            return 0
        descriptor = self._opened()
        # Where memory and file begin at the same place in a block, whole blocks need no copy.
        in_place = (out.ctypes.data - start) % BLOCK == 0
        while done < out.size and descriptor is not None:
            at, rest = start + done, out.size - done
            before = at % BLOCK
            copied = not in_place or before > 0 or rest < BLOCK
            if copied:
                (into,) = _BOUNCE.shaped(1, BLOCK if in_place else min(_PIECE, -(-(before + rest) // BLOCK) * BLOCK))
            else:
                into = out[done : done + rest // BLOCK * BLOCK]
            try:
                there = os.preadv(descriptor, [into.data], at - before)
            except OSError:
                # A file system may take the flag and still refuse the read. A disk that fails will do so again.
                self._refused = True
                break
            size = min(there - before, rest)
            if size <= 0:
                break  # the file was cut short
            if copied:
                out[done : done + size] = into[before : before + size]
            done += size
        return done

    def _is_cached(self, start: int) -> bool:
        """Whether the page cache had most of the region around a byte when one of it was first asked for."""
        region = start // _REGION
        if region not in self._cached:
            first = region * _REGION
            size = min(_REGION, self._size - first)
            pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
            # Of a file that this user could not write to the kernel says that it has all.
            failed = _LIBC.mincore(self._address + first, size, pages.ctypes.data)
            self._cached[region] = bool(failed or 2 * np.count_nonzero(pages & 1) > pages.size)
        return self._cached[region]

    def _opened(self) -> int | None:
        """A descriptor of its own, since the flag is the open file's; None where there is none to be had.

        The last of those that the process may have are for files that cannot be read, or written, without.
        """
        with self._lock, contextlib.suppress(OSError):
            if self._direct is None:
                flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                opened = os.open(f"/proc/self/fd/{self._descriptor}", flags)
                if opened >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4:
                    os.close(opened)
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self._direct = opened
                weakref.finalize(self, os.close, opened).atexit = False  # not while a thread still reads
            return self._direct
        self._refused = True
        return None
