"""A file mapped into memory, whose pages are brought in where a view is taken and nowhere else."""

import ctypes
import errno
import mmap
import os

import numpy as np

from reshard.errors import SourceError
from reshard.source.base import Bytes

_MADV_POPULATE_READ = 22  # linux/mman.h, since 5.14
_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


class MappedFile:
    """Views of an open file, whose descriptor stays open while views are taken.

    Safe to use from several threads; the map goes with the last view of it.

    Raises ValueError for an empty file, OSError where it cannot be mapped.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._name = name
        self._descriptor = descriptor
        self._data: Bytes = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
        self._present = bytearray(-(-self._data.size // _PAGE))  # 1 for each page that was brought in

    def view(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop), their pages brought in.

        A page that cannot be had (a bad disk, a file cut meanwhile) is an error here, not a SIGBUS at its first use.
        """
        if stop > (size := min(self._data.size, os.fstat(self._descriptor).st_size)):
            raise SourceError(
                f"{self._name}: {size} bytes, expected at least {stop}; it was cut short after its header was read"
            )
        first, last = start // _PAGE, -(-stop // _PAGE)
        # Once for each page: ranks take their columns from the same rows in turn.
        missing = self._present.find(0, first, last)
        if missing >= 0:
            self._bring_in(missing * _PAGE, stop)
            self._present[missing:last] = bytes([1]) * (last - missing)
        return self._data[start:stop]

    def _bring_in(self, start: int, stop: int) -> None:
        # Through ctypes, not mmap.madvise: that one holds the interpreter's lock while pages are read.
        address = ctypes.c_void_p(self._data.ctypes.data + start)
        if _LIBC.madvise(address, ctypes.c_size_t(stop - start), _MADV_POPULATE_READ) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # an older kernel: the pages come at first use
            raise SourceError(
                f"{self._name}: bytes {start} to {stop} cannot be read ({errno.errorcode.get(code, code)}): "
                "the file was cut short meanwhile, or its disk is failing"
            )
