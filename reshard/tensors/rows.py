"""Rows of bytes that lie a stride apart in a file, whatever becomes of the file meanwhile.

Who touches a map of a file that has been cut short, or whose disk fails, is killed (SIGBUS); the kernel is not. So it
is the kernel that copies, also out of a map: a rank's columns of many rows in one call, where a call for each row would
take longer than to cut them.
"""

import contextlib
import ctypes
import mmap
import os
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reshard.errors import SourceError
from reshard.tensors.direct import DirectReader
from reshard.tensors.memory import Bytes

_AT_ONCE = 1024  # IOV_MAX
_FEW = 16  # rows
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.process_vm_writev.restype = ctypes.c_ssize_t
_LIBC.process_vm_writev.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]


class Descriptor(Protocol):
    """An open file, closed when nothing refers to it any more."""

    def fileno(self) -> int: ...


class RowReader:
    """Reads an open file. Safe to use from several threads."""

    def __init__(self, stream: Descriptor, name: str) -> None:
        self._stream = stream
        self._name = name
        self._map: mmap.mmap | bytes = b""
        self._address = 0
        with contextlib.suppress(OSError, ValueError):  # no file system has to map, and nothing is mapped of no bytes
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._address = np.frombuffer(self._map, np.uint8).ctypes.data  # nobody reads there
        self._direct = DirectReader(stream.fileno(), self._address, len(self._map))

    def read(self, out: Bytes, start: int, stride: int, once: bool = False) -> None:
        """Fill `out` [rows, bytes], row i with the file's bytes from start + i * stride.

        once: nobody reads them again; they need not go through the page cache. Raises OSError where they cannot be
        read, SourceError where the file ends before.
        """
        rows, width = out.shape
        if not out.size:
            return
        if out.flags.c_contiguous and (width == stride or rows == 1):
            done = self._direct.read(out.reshape(-1), start) if once else 0
            if done < out.size:
                self._fill([out.data.cast("B")[done:]], start + done)
            return
        for top in range(0, rows, _AT_ONCE):
            block, at = out[top : top + _AT_ONCE], start + top * stride
            if width == stride:
                self._fill([row.data for row in block], at)
                continue
            # Around what is read of a map the kernel reads on, megabytes of some disks: not for a few rows.
            copied = self._gather(block, at, stride) if rows > _FEW else 0
            # Of what the kernel could not copy, or was not allowed to, each row says why, or is there after all.
            for row in range(copied, len(block)):
                self._fill([block[row].data], at + row * stride)

    def _fill(self, parts: list[memoryview], start: int) -> None:
        """Parts of memory, one after the other, with bytes that follow one another in the file."""
        while parts:
            size = os.preadv(self._stream.fileno(), parts, start)
            if not size:
                expected = start + sum(map(len, parts))
                raise SourceError(
                    f"{self._name}: ends at byte {start}, expected {expected}; it was cut short after its header was "
                    "read"
                )
            start += size
            while parts and size >= len(parts[0]):
                size -= len(parts.pop(0))
            if size:
                parts[0] = parts[0][size:]

    def _gather(self, out: Bytes, start: int, stride: int) -> int:
        """How many rows were copied out of the map."""
        rows, width = out.shape
        if start + (rows - 1) * stride + width > len(self._map):
            return 0
        there = _pieces(self._address + start, rows, stride, width)
        here = _pieces(
            out.ctypes.data, *((1, 0, out.nbytes) if out.flags.c_contiguous else (rows, out.strides[0], width))
        )
        done: int = _LIBC.process_vm_writev(os.getpid(), there.ctypes.data, len(there), here.ctypes.data, len(here), 0)
        return max(0, done // int(width))


def _pieces(address: int, count: int, stride: int, width: int) -> npt.NDArray[np.uintp]:
    """[count] struct iovec: address, length."""
    pieces = np.empty((count, 2), np.uintp)
    pieces[:, 0] = address + np.arange(count) * stride
    pieces[:, 1] = width
    return pieces
