"""Shards of neighbouring ranks, written in step, so that what they have columns of is read once for all of them.

Of a row-parallel weight each rank has a few bytes of every row. Read for each by itself, these would come out of the
page cache a row at a time, or from the disk with all that lies between. So the workers write all the ranks at once, and
go through such a weight together, strip by strip: whole rows, read by whoever needs them first.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from reshard.plan.plan import ALIGNMENT, PlannedShard, PlannedTensor
from reshard.source.base import Range
from reshard.tensors.byte_grid import BlockReader
from reshard.tensors.direct import BLOCK
from reshard.tensors.memory import Bytes, aligned
from reshard.workers import LOOK_SECONDS
from reshard.writer import stream
from reshard.writer.team import Place, share

Readers = Mapping[str, BlockReader]

STRIP_BYTES = 8 << 20
_STRIPS = 4  # held at once: whoever is ahead reads the next one while another still writes from the last one
_STAGES_BYTES = 64 << 20  # of all shards that are written in step
_IN_STEP = 128  # shards: each is an open file


@dataclass(frozen=True)
class Group:
    """Shards that one worker writes, a step of each in turn, in step with the other groups of `strips`."""

    shards: Sequence[PlannedShard]
    stage_bytes: int | None = None
    strips: "_Strips | None" = None

    @contextmanager
    def reading(self, number: int, readers: Readers) -> Iterator[tuple[Readers, int | None]]:
        """Readers of the shards' tensors of this number, and how many rows of each are to be written in turn."""
        columns = self.strips.columns.get(number) if self.strips else None
        if self.strips is None or columns is None or not _any_columns(self.shards, number):
            yield readers, None
            return
        reader = _StripReader(self.strips, columns, readers[columns.tensor])
        yield {**readers, columns.tensor: reader}, columns.strip_rows
        reader.leave()  # after an error nobody waits for this: `tick` ends the others


def grouped(shards: Sequence[PlannedShard], workers: int, readers: Readers, tick: Callable[[int], None]) -> list[Group]:
    """The shards, by rank, as so many workers write them. tick: called while a worker waits, raises to end it."""
    groups: list[Group] = []
    for run in _runs(shards):
        dealt = [share(run, Place(number, workers)) for number in range(min(workers, len(run)))]
        columns = _in_common(dealt)
        if not columns:
            groups += [Group([shard]) for shard in run]  # each at its own pace
            continue
        stage_bytes = min(stream.STAGE_BYTES, _STAGES_BYTES // len(run) // ALIGNMENT * ALIGNMENT)
        strips = _Strips(columns, readers, tick)
        groups += [Group(part, stage_bytes, strips) for part in dealt]
    return groups


def _runs(shards: Sequence[PlannedShard]) -> list[list[PlannedShard]]:
    """Ranks that follow one another: what lies between others is not read for nothing."""
    runs: list[list[PlannedShard]] = []
    for shard in shards:
        if runs and runs[-1][-1].tp_rank + 1 == shard.tp_rank and len(runs[-1]) < _IN_STEP:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return runs


@dataclass(frozen=True)
class _Columns:
    """Columns of a tensor's byte grid that `takers` groups need: `width` bytes of each row, from `left` on.

    first: the number of its first strip.
    """

    tensor: str
    rows: int
    left: int
    width: int
    takers: int
    first: int

    @property
    def strip_rows(self) -> int:
        return STRIP_BYTES // self.width

    @property
    def strip_count(self) -> int:
        return -(-self.rows // self.strip_rows)


def _in_common(groups: Sequence[Sequence[PlannedShard]]) -> dict[int, _Columns]:
    """By a tensor's number in every shard, those of which several shards have columns, and that are not small."""
    found: dict[int, _Columns] = {}
    first = 0
    for number in range(len(groups[0][0].tensors)):
        blocks = [block for shards in groups for shard in shards for block in _columns(shard.tensors[number])]
        if len(blocks) < 2 or len({(tensor, rows) for tensor, rows, _, _ in blocks}) > 1:
            continue
        tensor, rows, _, _ = blocks[0]
        left = min(left for _, _, left, _ in blocks)
        width = max(left + width for _, _, left, width in blocks) - left
        is_small = rows * width <= stream.STAGE_BYTES
        if is_small or width > STRIP_BYTES or width != sum(width for *_, width in blocks):
            continue
        takers = sum(_any_columns(shards, number) for shards in groups)
        found[number] = _Columns(tensor, rows, left, width, takers, first)
        first += found[number].strip_count
    return found


def _any_columns(shards: Sequence[PlannedShard], number: int) -> bool:
    return any(_columns(shard.tensors[number]) for shard in shards)


def _columns(tensor: PlannedTensor) -> list[tuple[str, int, int, int]]:
    """What a tensor has columns of: (source tensor, rows, first byte of a row, bytes of a row)."""
    blocks = ((piece, tensor.source_block(piece)) for piece in tensor.slices if piece.dim == 1)
    return [(piece.tensor, rows, left, width) for piece, (_, left, rows, width) in blocks]


class _Strips:
    """Strips of several tensors, one after the other, for several threads; each takes those that it needs in order.

    columns: by the number of the tensor in a shard. tick: called while a thread waits, raises to end it.
    """

    def __init__(self, columns: Mapping[int, _Columns], readers: Readers, tick: Callable[[int], None]) -> None:
        self.columns = columns
        self._strips = [(one, number) for one in columns.values() for number in range(one.strip_count)]
        self._takers = [one.takers for one, _ in self._strips]  # who have not left it yet
        self._readers = readers
        self._tick = tick
        self._memory: list[Bytes] = []
        self._starts = [0] * _STRIPS
        self._begun = self._left = 0  # strips: whose reading has begun, and that all have left
        self._read: set[int] = set()
        self._changed = threading.Condition()

    def take(self, number: int) -> Bytes:
        """[rows, width] of a strip, once it is read, valid until this thread leaves it. Raises as its reader does."""
        while True:
            with self._changed:
                while number not in self._read and self._begun == min(self._left + _STRIPS, len(self._strips)):
                    self._changed.wait(LOOK_SECONDS)
                    self._tick(0)
                if number in self._read:
                    return self._rows(number)
                mine = self._begun
                self._begun += 1
                if len(self._memory) < _STRIPS:
                    self._memory.append(aligned(BLOCK + STRIP_BYTES))
            self._fill(mine)
            with self._changed:
                self._read.add(mine)
                self._changed.notify_all()

    def leave(self, number: int) -> None:
        """A thread is through with a strip."""
        with self._changed:
            self._takers[number] -= 1
            while self._left < len(self._strips) and not self._takers[self._left]:
                self._read.discard(self._left)
                self._left += 1
                self._changed.notify_all()
            if self._left == len(self._strips):
                self._memory.clear()  # not kept until the last shard of a set is written

    def _fill(self, number: int) -> None:
        columns, strip = self._strips[number]
        reader, row = self._readers[columns.tensor], strip * columns.strip_rows
        # As far behind a block's start as in the file: then blocks can be read to where they belong.
        place = next(iter(reader.ranges(row, columns.left, 1, columns.width)))
        self._starts[number % _STRIPS] = place[1] % BLOCK
        reader.read(self._rows(number), row, columns.left)

    def _rows(self, number: int) -> Bytes:
        columns, strip = self._strips[number]
        rows, start = min(columns.strip_rows, columns.rows - strip * columns.strip_rows), self._starts[number % _STRIPS]
        return self._memory[number % _STRIPS][start : start + rows * columns.width].reshape(rows, columns.width)


class _StripReader:
    """Reads blocks of a tensor out of the strips that hold them. For one thread, which asks for the rows in order."""

    def __init__(self, strips: _Strips, columns: _Columns, reader: BlockReader) -> None:
        self._strips, self._columns, self._reader = strips, columns, reader
        self._number: int | None = None
        self._held: Bytes = np.empty((0, 0), np.uint8)

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column), rows of one strip."""
        strip, top = divmod(row, self._columns.strip_rows)
        number = self._columns.first + strip
        if number != self._number:
            self.leave()
            self._held, self._number = self._strips.take(number), number
        left = column - self._columns.left
        np.copyto(out, self._held[top : top + out.shape[0], left : left + out.shape[1]])

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the source's files holds a block of [rows, width] bytes."""
        return self._reader.ranges(row, column, rows, width)

    def leave(self) -> None:
        """The strip that was read last is not needed any more."""
        if self._number is not None:
            self._strips.leave(self._number)
            self._number = None
