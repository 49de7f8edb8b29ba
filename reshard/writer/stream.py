"""One shard file, written front to back past the page cache where the file system allows it.

Bytes are gathered in a small page-aligned stage that stays in the processor's cache: there they are hashed, and from
there the disk takes them. So nothing waits in the page cache for the closing fsync, and memory does not grow.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3

from reshard.blocks import BlockReader
from reshard.dtypes import itemsize
from reshard.plan import ALIGNMENT, PlannedTensor

STAGE_BYTES = 1 << 20


class ShardStream:
    """Writes a file that does not exist yet. `close` makes it durable; `discard` removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _create(path)
        memory = mmap.mmap(-1, STAGE_BYTES)  # page-aligned, as direct writes want it
        self._memory = memoryview(memory)
        self._stage = np.frombuffer(memory, np.uint8)
        self._filled = 0
        self._written = 0
        self._hasher = blake3()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        view = np.frombuffer(data, np.uint8)
        while view.size:
            size = min(view.size, STAGE_BYTES - self._filled)
            self._stage[self._filled : self._filled + size] = view[:size]
            self._advance(size)
            view = view[size:]

    def write_tensor(
        self, tensor: PlannedTensor, readers: Mapping[str, BlockReader], tick: Callable[[int], None]
    ) -> str:
        """Append a tensor, put together from its slices; bytes that none covers are zero. Returns its BLAKE3.

        tick: called with the bytes of each step.
        """
        hasher = blake3()
        grid = _Grid(tensor, readers)
        at = 0
        while at < tensor.nbytes:
            size = min(tensor.nbytes - at, STAGE_BYTES - self._filled)
            grid.fill(self._stage[self._filled : self._filled + size], at)
            hasher.update(self._memory[self._filled : self._filled + size])
            self._advance(size)
            at += size
            tick(size)
        return hasher.hexdigest()

    def close(self) -> tuple[int, str]:
        """Write what is staged and fsync. Returns the file's size and BLAKE3."""
        self._flush()
        os.fsync(self._descriptor)
        self._release()
        return self._written, self._hasher.hexdigest()

    def discard(self) -> None:
        """Close and remove the file."""
        self._release()
        self.path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _advance(self, size: int) -> None:
        self._filled += size
        if self._filled == STAGE_BYTES:
            self._flush()

    def _flush(self) -> None:
        data = self._memory[: self._filled]
        self._hasher.update(data)
        if self._filled % ALIGNMENT:
            _leave_direct(self._descriptor)  # only the file's tail is no whole number of pages
        while data:
            size = _write(self._descriptor, data, self._written)
            self._written += size
            data = data[size:]
        self._filled = 0


class _Grid:
    """The byte grid of a planned tensor, filled range by range."""

    def __init__(self, tensor: PlannedTensor, readers: Mapping[str, BlockReader]) -> None:
        rows = tensor.shape[0] if tensor.shape else 1
        self._row_bytes = tensor.nbytes // rows
        self._placed = []
        covered = 0
        for piece in tensor.slices:
            row, column, n_rows, n_bytes = tensor.source_block(piece)
            at = (piece.at, 0) if piece.dim == 0 else (0, piece.at * itemsize(tensor.dtype))
            # (reader, row and column in the source; row, column, rows and bytes in the shard)
            place = (readers[piece.tensor], row, column, *at, n_rows, n_bytes)
            self._placed.append(place)
            covered += place[5] * place[6]
        self._has_zeros = covered < tensor.nbytes

    def fill(self, out: np.ndarray[tuple[int], np.dtype[np.uint8]], at: int) -> None:
        """Fill `out` with the grid's bytes from `at`: the rest of a row, whole rows, the start of a row."""
        if self._has_zeros:
            out.fill(0)
        width, done = self._row_bytes, 0
        while done < out.size:
            row, column = divmod(at + done, width)
            rows = 1 if column else max(1, (out.size - done) // width)
            size = min(out.size - done, width - column) if rows == 1 else rows * width
            self._fill_block(out[done : done + size].reshape(rows, -1), row, column)
            done += size

    def _fill_block(self, out: np.ndarray[tuple[int, int], np.dtype[np.uint8]], row: int, column: int) -> None:
        rows, width = out.shape
        for reader, source_row, source_column, at_row, at_column, n_rows, n_bytes in self._placed:
            top, bottom = max(row, at_row), min(row + rows, at_row + n_rows)
            left, right = max(column, at_column), min(column + width, at_column + n_bytes)
            if top < bottom and left < right:
                block = out[top - row : bottom - row, left - column : right - column]
                reader.read(block, source_row + top - at_row, source_column + left - at_column)


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
