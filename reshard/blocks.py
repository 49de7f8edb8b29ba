"""Blocks of a tensor's byte grid, wherever its bytes lie."""

from typing import Protocol

import numpy as np

from reshard.checkpoint import Part, Tensor
from reshard.source.base import Bytes, Source


class BlockReader(Protocol):
    """Reads blocks of one tensor. Safe to use from several threads."""

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""


class StoredReader:
    """A tensor whose bytes lie in files, in one rectangle or several."""

    def __init__(self, source: Source, tensor: Tensor) -> None:
        self._source = source
        self._parts = tensor.parts

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""
        rows, width = out.shape
        for part in self._parts:
            top, bottom = max(row, part.row), min(row + rows, part.row + part.rows)
            left, right = max(column, part.column), min(column + width, part.column + part.width)
            if top < bottom and left < right:
                block = _view(self._source, part, top - part.row, bottom - top, left - part.column, right - left)
                np.copyto(out[top - row : bottom - row, left - column : right - column], block)


def _view(source: Source, part: Part, row: int, rows: int, column: int, width: int) -> Bytes:
    """A block of a part, as a view of the source's memory."""
    start = part.offset + row * part.stride + column
    span = source.view(part.file, start, start + (rows - 1) * part.stride + width)
    return np.ndarray((rows, width), np.uint8, buffer=span.data, strides=(part.stride, 1))


def read_whole(reader: BlockReader, tensor: Tensor) -> bytes:
    """All bytes of a (small) tensor."""
    out = np.empty((tensor.rows, tensor.row_bytes), np.uint8)
    reader.read(out, 0, 0)
    return out.tobytes()
