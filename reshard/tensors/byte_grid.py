"""Blocks of a tensor's byte grid, wherever its bytes lie."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from reshard.checkpoint.description import Part, Tensor
from reshard.source.base import Bytes, Range, Source


class BlockReader(Protocol):
    """Reads blocks of one tensor. Safe to use from several threads."""

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files has to be there to read a block of [rows, width] bytes."""


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
                span = self._source.view(*_span(part, top, bottom, left, right))
                block = np.ndarray((bottom - top, right - left), np.uint8, buffer=span.data, strides=(part.stride, 1))
                np.copyto(out[top - row : bottom - row, left - column : right - column], block)

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files holds a block of [rows, width] bytes."""
        for part in self._parts:
            top, bottom = max(row, part.row), min(row + rows, part.row + part.rows)
            left, right = max(column, part.column), min(column + width, part.column + part.width)
            if top < bottom and left < right:
                yield _span(part, top, bottom, left, right)


def _span(part: Part, top: int, bottom: int, left: int, right: int) -> Range:
    """From the first to the last byte of a block of the grid that lies within a part."""
    start = part.offset + (top - part.row) * part.stride + left - part.column
    return part.file, start, start + (bottom - top - 1) * part.stride + right - left


def read_whole(reader: BlockReader, tensor: Tensor) -> bytes:
    """All bytes of a (small) tensor."""
    out = np.empty((tensor.rows, tensor.row_bytes), np.uint8)
    reader.read(out, 0, 0)
    return out.tobytes()
