"""Shards of neighbouring ranks, written side by side, so that what is narrow is read for all of them at once.

Of a row-parallel weight a rank of many has a few hundred bytes of each row. Each lies on a page of its own, and to find
that takes longer than to copy 2,000 bytes of it.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from reshard.plan.plan import PlannedShard, PlannedTensor
from reshard.source.base import Bytes, Range
from reshard.tensors.byte_grid import BlockReader
from reshard.writer.stream import STAGE_BYTES

_WIDE = 2048  # bytes of a row


def side_by_side(shards: Sequence[PlannedShard], workers: int) -> list[list[PlannedShard]]:
    """The shards that are written together: so many that large tensors' columns are wide. Each worker has some."""
    widths = (
        tensor.source_block(piece)[3]
        for shard in shards
        for tensor in shard.tensors
        for piece in tensor.slices
        if piece.dim == 1 and tensor.nbytes > STAGE_BYTES
    )
    together = min(-(-_WIDE // min(widths, default=_WIDE)), len(shards) // workers)
    groups: list[list[PlannedShard]] = []
    for shard in shards:
        if groups and len(groups[-1]) < together and groups[-1][-1].tp_rank + 1 == shard.tp_rank:
            groups[-1].append(shard)
        else:
            groups.append([shard])
    return groups


def read_together(tensors: Sequence[PlannedTensor], readers: Mapping[str, BlockReader]) -> Mapping[str, BlockReader]:
    """Readers of one tensor's parts, of several ranks, that are filled in turn, about the same rows of each."""
    if len(tensors) == 1:
        return readers
    blocks: dict[str, list[tuple[int, int, int, int]]] = {}
    for tensor in tensors:
        for piece in tensor.slices:
            if piece.dim == 1:
                blocks.setdefault(piece.tensor, []).append(tensor.source_block(piece))
    strips = {
        name: _Strip(
            readers[name],
            rows=max(rows for _, _, rows, _ in found),
            left=min(left for _, left, _, _ in found),
            right=max(left + width for _, left, _, width in found),
        )
        for name, found in blocks.items()
    }
    return {**readers, **strips}


class _Strip:
    """Columns left..right of a tensor's byte grid: the rows that were read last are held. For one thread."""

    def __init__(self, reader: BlockReader, rows: int, left: int, right: int) -> None:
        self._reader, self._rows, self._left = reader, rows, left
        self._top = 0
        self._held: Bytes = np.empty((0, right - left), np.uint8)

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""
        rows, width = out.shape
        if not self._top <= row <= row + rows <= self._top + len(self._held):
            # With the rows before and behind, of which the other ranks want the rest, and the start.
            self._top = max(0, row - 1)
            self._held = np.empty((min(self._rows, row + rows + 1) - self._top, self._held.shape[1]), np.uint8)
            self._reader.read(self._held, self._top, self._left)
        top, left = row - self._top, column - self._left
        np.copyto(out, self._held[top : top + rows, left : left + width])

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files holds a block of [rows, width] bytes."""
        return self._reader.ranges(row, column, rows, width)
