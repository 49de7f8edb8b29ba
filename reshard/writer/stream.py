"""One shard file, put together and hashed front to back.

Bytes are gathered in a small stage that stays in the processor's cache: there they are hashed, and from there the
target takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from blake3 import blake3

from reshard.manifest import Shard
from reshard.plan.plan import PlannedShard, PlannedTensor
from reshard.tensors.byte_grid import BlockReader
from reshard.tensors.dtypes import itemsize
from reshard.tensors.memory import Bytes, aligned

STAGE_BYTES = 1 << 20


class Sink(Protocol):
    """Takes a file's bytes, front to back."""

    def write(self, data: memoryview) -> None:
        """Append bytes."""

    def close(self) -> None:
        """Make what was written durable."""


class ShardStream:
    """Writes into a sink. stage_bytes: a multiple of ALIGNMENT, by default STAGE_BYTES."""

    def __init__(self, sink: Sink, stage_bytes: int | None = None) -> None:
        self._sink = sink
        self._stage = aligned(stage_bytes or STAGE_BYTES)
        self._filled = 0
        self._written = 0
        self._hasher = blake3()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        view = np.frombuffer(data, np.uint8)
        while view.size:
            room = self._room(view.size)
            room[:] = view[: room.size]
            self._advance(room.size)
            view = view[room.size :]

    def write_tensor(
        self, tensor: PlannedTensor, readers: Mapping[str, BlockReader], tick: Callable[[int], None]
    ) -> str:
        """Append a tensor, put together from its slices; bytes that none covers are zero. Returns its BLAKE3.

        tick: called with the bytes of each step.
        """
        (digest,) = write_tensors([self], [tensor], readers, tick)
        return digest

    def append(self, grid: "_Grid", start: int, stop: int, hasher: blake3, tick: Callable[[int], None]) -> None:
        """Append a tensor's bytes [start, stop). tick: called with the bytes of each step."""
        while start < stop:
            room = self._room(stop - start)
            grid.fill(room, start)
            hasher.update(room.data)
            self._advance(room.size)
            start += room.size
            tick(room.size)

    def close(self) -> tuple[int, str]:
        """Write what is staged and make it durable. Returns the file's size and BLAKE3."""
        self._flush()
        self._sink.close()
        return self._written, self._hasher.hexdigest()

    def _room(self, wanted: int) -> Bytes:
        """Memory for the next bytes, so many if there is room for them."""
        return self._stage[self._filled : self._filled + wanted]

    def _advance(self, size: int) -> None:
        self._filled += size
        if self._filled == self._stage.size:
            self._flush()

    def _flush(self) -> None:
        data = self._stage[: self._filled].data
        self._hasher.update(data)
        self._sink.write(data)
        self._written += self._filled
        self._filled = 0


def write_tensors(
    streams: Sequence[ShardStream],
    tensors: Sequence[PlannedTensor],
    readers: Mapping[str, BlockReader],
    tick: Callable[[int], None],
    rows: int | None = None,
) -> list[str]:
    """Append to each stream its tensor, to all of them so many rows in turn. Returns the tensors' BLAKE3.

    rows: by default all. tick: called with the bytes of each step.
    """
    grids, hashers = [_Grid(tensor, readers) for tensor in tensors], [blake3() for _ in tensors]
    most = max(grid.rows for grid in grids)
    for top in range(0, most, rows or most):
        for stream, grid, hasher in zip(streams, grids, hashers, strict=True):
            start, stop = (min(row, grid.rows) * grid.row_bytes for row in (top, top + (rows or most)))
            stream.append(grid, start, stop, hasher, tick)
    return [hasher.hexdigest() for hasher in hashers]


class _Nowhere:
    """A sink that keeps nothing."""

    def write(self, data: memoryview) -> None:
        """It is hashed already."""

    def close(self) -> None:
        """Nothing is open."""


def first_difference(
    planned: PlannedShard, shard: Shard, readers: Mapping[str, BlockReader], tick: Callable[[int], None]
) -> str | None:
    """The first tensor of a finished shard that is not what it would be if it were cut now; None if it is the same."""
    stream = ShardStream(_Nowhere())
    stream.write(planned.header)
    for tensor, entry in zip(planned.tensors, shard.tensors, strict=True):
        if stream.write_tensor(tensor, readers, tick) != entry.blake3:
            return tensor.name
    return None if stream.close() == (shard.size, shard.blake3) else "its header"


class _Grid:
    """The byte grid of a planned tensor, filled range by range."""

    def __init__(self, tensor: PlannedTensor, readers: Mapping[str, BlockReader]) -> None:
        self.rows = tensor.shape[0] if tensor.shape else 1
        self.row_bytes = tensor.nbytes // self.rows
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

    def fill(self, out: Bytes, at: int) -> None:
        """Fill `out` with the grid's bytes from `at`: the rest of a row, whole rows, the start of a row."""
        if self._has_zeros:
            out.fill(0)
        width, done = self.row_bytes, 0
        while done < out.size:
            row, column = divmod(at + done, width)
            rows = 1 if column else max(1, (out.size - done) // width)
            size = min(out.size - done, width - column) if rows == 1 else rows * width
            self._fill_block(out[done : done + size].reshape(rows, -1), row, column)
            done += size

    def _fill_block(self, out: Bytes, row: int, column: int) -> None:
        rows, width = out.shape
        for reader, source_row, source_column, at_row, at_column, n_rows, n_bytes in self._placed:
            top, bottom = max(row, at_row), min(row + rows, at_row + n_rows)
            left, right = max(column, at_column), min(column + width, at_column + n_bytes)
            if top < bottom and left < right:
                block = out[top - row : bottom - row, left - column : right - column]
                reader.read(block, source_row + top - at_row, source_column + left - at_column)
