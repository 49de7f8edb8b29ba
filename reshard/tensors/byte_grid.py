"""Blocks of a tensor's byte grid, wherever its bytes lie."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from reshard.checkpoint.description import Extent, Tensor
from reshard.source.base import Range, Source
from reshard.tensors.memory import Bytes


class BlockReader(Protocol):
    """Reads blocks of one tensor. Safe to use from several threads."""

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files has to be there to read a block of [rows, width] bytes."""


class StoredReader:
    """A tensor whose bytes lie in files, in one rectangle or several. once: see `Source.read_rows`."""

    def __init__(self, source: Source, tensor: Tensor, once: bool = False) -> None:
        self._source = source
        self._once = once
        self._extents = tensor.extents

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""
        rows, width = out.shape
        for extent in self._extents:
            top, bottom = max(row, extent.row), min(row + rows, extent.row + extent.rows)
            left, right = max(column, extent.column), min(column + width, extent.column + extent.width)
            if top < bottom and left < right:
                file, start, _ = _span(extent, top, bottom, left, right)
                block = out[top - row : bottom - row, left - column : right - column]
                self._source.read_rows(block, file, start, extent.stride, self._once)

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files holds a block of [rows, width] bytes."""
        for extent in self._extents:
            top, bottom = max(row, extent.row), min(row + rows, extent.row + extent.rows)
            left, right = max(column, extent.column), min(column + width, extent.column + extent.width)
            if top < bottom and left < right:
                yield _span(extent, top, bottom, left, right)


def _span(extent: Extent, top: int, bottom: int, left: int, right: int) -> Range:
    """From the first to the last byte of a block of the grid that lies within an extent."""
    start = extent.offset + (top - extent.row) * extent.stride + left - extent.column
    return extent.file, start, start + (bottom - top - 1) * extent.stride + right - left


def read_whole(reader: BlockReader, tensor: Tensor) -> bytes:
    """All bytes of a (small) tensor."""
    out = np.empty((tensor.rows, tensor.row_bytes), np.uint8)
    reader.read(out, 0, 0)
    return out.tobytes()
