"""Memory that is used again and again."""

import mmap
import threading

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def aligned(size: int) -> Bytes:
    """Memory that begins on a page, as reads and writes past the page cache want it."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


class Memory(threading.local):
    """Memory of each thread's own: fresh one would be cleared by the kernel, page by page, to be overwritten."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def shaped(self, rows: int, width: int) -> Bytes:
        """[rows, width], from a page's start on, valid until the thread's next call."""
        if self._held.size < rows * width:
            self._held = aligned(rows * width)
        return self._held[: rows * width].reshape(rows, width)
