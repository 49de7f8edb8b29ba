"""Every byte of a shard set against the source it was cut from.

What each shard tensor must hold comes from reshard.verification.expect, what the source holds from
reshard.verification.reference: nothing of the code that made the set is trusted, nor the slices that its manifest
records.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.checkpoint.description import Checkpoint, Layer
from reshard.checks.finding import Finding
from reshard.checks.provenance import compare_identity, compare_model
from reshard.errors import MismatchError
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST, linear_name
from reshard.model.parts import Module
from reshard.source.base import Bytes, Source
from reshard.tensors.dtypes import itemsize
from reshard.tensors.header import Header, TensorInfo
from reshard.tensors.numeric import storage, to_f32
from reshard.tensors.rows import Memory
from reshard.verification.expect import Expected, Piece, expect, misfits, read_headers
from reshard.verification.reference import BLOCK_BYTES, BLOCK_ELEMENTS, WORKERS, Grid, LinearGrids, Reference
from reshard.workers import Workers

Tick = Callable[[int], None]
_MEMORY = Memory()


def compare_with_source(
    shards: Source, manifest: Manifest, source: Source, checkpoint: Checkpoint, tick: Tick = lambda n: None
) -> list[Finding]:
    """What differs, at most one finding for each tensor of a shard. checkpoint: `describe(source)`, unconverted.

    `tick` is called with the shard bytes of each step.
    """
    findings = [*compare_identity(manifest, checkpoint), *compare_model(manifest, checkpoint)]
    headers, unreadable = read_headers(shards, manifest)
    findings += unreadable
    reference, workers = Reference(source, manifest), Workers(WORKERS, shards, source)
    wanted: dict[int, set[str]] = {rank: set() for rank in headers}
    for layer in checkpoint.layers:
        _prefetch(shards, manifest, headers, source, layer)
        for module in layer.part.laid_out(manifest.layout):
            name = layer.name(module.name)
            try:
                linears = [reference.linear(layer.linears[role.name], name) for role in module.roles]
                expected = {rank: expect(module, name, linears, manifest, rank) for rank in headers}
            except MismatchError as error:
                findings.append(Finding("conversion", name, str(error)))
                # Its tensors are not judged, so none of them is called superfluous.
                for rank, header in headers.items():
                    wanted[rank] |= {tensor for tensor in header.tensors if tensor.rpartition(".")[0] == name}
                continue
            findings += _check_scheme(manifest, layer.index, module, linears[0])
            findings += _compare_group(workers, shards, manifest, headers, linears, expected, tick)
            for rank, tensors in expected.items():
                wanted[rank] |= {tensor.name for tensor in tensors}
    for rank, header in headers.items():
        for name in sorted(header.tensors.keys() - wanted[rank]):
            where = f"{manifest.shards[rank].file}: {name}"
            findings.append(Finding("names", where, "the source calls for no such tensor"))
    return findings


def _prefetch(shards: Source, manifest: Manifest, headers: Mapping[int, Header], source: Source, layer: Layer) -> None:
    """Ask for a layer's bytes, of both sides."""
    source.prefetch(
        (part.file, part.offset, part.offset + (part.rows - 1) * part.stride + part.width)
        for tensor in layer.tensors()
        for part in tensor.extents
    )
    shards.prefetch(
        (manifest.shards[rank].file, info.start, info.stop)
        for rank, header in headers.items()
        for name, info in header.tensors.items()
        if name.startswith(f"{layer.module}.")
    )


@dataclass(frozen=True)
class _Target:
    """A piece in the file that must hold it."""

    file: str
    name: str
    info: TensorInfo
    row_bytes: int
    piece: Piece

    @property
    def where(self) -> str:
        """For findings."""
        return f"{self.file}: {self.name}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return itemsize(self.info.dtype)

    def fetch(self, shards: Source, top: int, bottom: int) -> Bytes:
        """Rows top..bottom of the shard tensor, the piece's columns of them; valid until the thread's next call."""
        out = _MEMORY.shaped(bottom - top, self.piece.columns * self.itemsize)
        start = self.info.start + top * self.row_bytes + self.piece.column * self.itemsize
        shards.read_rows(out, self.file, start, self.row_bytes)
        return out


def _compare_group(
    workers: Workers,
    shards: Source,
    manifest: Manifest,
    headers: Mapping[int, Header],
    linears: Sequence[LinearGrids],
    expected: Mapping[int, Sequence[Expected]],
    tick: Tick,
) -> list[Finding]:
    """A module's tensors in all shards: each row of the source is fetched once, and compared wherever it went."""
    found = {finding.where: finding for finding in misfits(manifest, headers, expected)}
    targets = []
    for rank, tensors in expected.items():
        file = manifest.shards[rank].file
        for tensor in tensors:
            if f"{file}: {tensor.name}" not in found:
                info = headers[rank].tensors[tensor.name]
                row_bytes = (info.stop - info.start) // (tensor.shape[0] if tensor.shape else 1)
                targets += [_Target(file, tensor.name, info, row_bytes, piece) for piece in tensor.pieces]
    stored = [grid for linear in linears for grid in linear.tensors.values()]
    zeros = [target.piece.grid for target in targets if target.piece.grid.is_zeros]
    steps = (step for grid in (*stored, *zeros) for step in _steps(grid))

    def compare(step: tuple[Grid, int, int]) -> list[Finding]:
        differences, nbytes = _compare(shards, targets, *step)
        tick(nbytes)
        return differences

    for differences in workers.map(compare, steps):
        for difference in differences:  # in the order of the steps: a tensor's first one stays
            found.setdefault(difference.where, difference)
    return list(found.values())


def _steps(grid: Grid) -> Iterator[tuple[Grid, int, int]]:
    """Row ranges."""
    size = (grid.columns, BLOCK_ELEMENTS) if grid.made_by else (grid.row_bytes, BLOCK_BYTES)
    for top, bottom in grid.blocks(*size):
        yield grid, top, bottom


@np.errstate(all="ignore")  # a wrong source may hold what is no number: a finding, not a warning
def _compare(
    shards: Source, targets: Sequence[_Target], grid: Grid, top: int, bottom: int
) -> tuple[list[Finding], int]:
    """Rows top..bottom of a source tensor, or of zeros, with each place that they or a part of them went to.

    What differs, and the shard bytes that were looked at.
    """
    rows = grid.fetch(top, bottom)
    differences, nbytes = [], 0
    for target in targets:
        piece, size = target.piece, target.itemsize
        first, last = max(top, piece.from_row), min(bottom, piece.from_row + piece.rows)
        if piece.grid is not grid or first >= last or piece.columns == 0:
            continue
        row = piece.row + first - piece.from_row  # in the shard
        got = target.fetch(shards, row, row + last - first)
        left = piece.from_column * size
        wanted = rows[first - top : last - top, left : left + piece.columns * size]
        nbytes += got.size
        if not np.array_equal(got, wanted):
            at, column = _first_difference(got, wanted, size)
            got_is, must_be = (_shown(block, at, column, target.info.dtype) for block in (got, wanted))
            message = f"row {row + at}, column {piece.column + column} is {got_is}, "
            if grid.is_zeros:
                message += "must be 0: nothing of the source belongs there"
            else:
                made = f", by {grid.made_by}" if grid.made_by else ""
                place = f"{grid.name} row {first + at}, column {piece.from_column + column}"
                message += f"must be {must_be}: {place}{made}"
            differences.append(Finding("bytes", target.where, message))
    return differences, nbytes


def _first_difference(got: Bytes, wanted: Bytes, size: int) -> tuple[int, int]:
    """Row and column of the first element that differs."""
    at = int(np.argmax((got != wanted).reshape(-1)))
    return at // got.shape[1], at % got.shape[1] // size


def _shown(block: Bytes, row: int, column: int, dtype: str) -> str:
    """An element, as a number and as its bits."""
    bits = np.ascontiguousarray(block[row]).view(storage(dtype))[column : column + 1]
    pattern = int.from_bytes(bits.tobytes(), "little")
    value = str(int(bits[0])) if dtype in {"I8", "I32", "I64"} else f"{to_f32(bits, dtype)[0]:.9g}"
    return f"{value} (0x{pattern:0{2 * bits.itemsize}x})"


def _check_scheme(manifest: Manifest, index: int | None, module: Module, linear: LinearGrids) -> Iterator[Finding]:
    where = linear_name(manifest.model.prefix, index, module.name, manifest.what)
    for layer in manifest.layers:
        recorded = layer.linears.get(manifest.what.stack(module.name) or module.name)
        if layer.index != index or recorded is None:
            continue
        if recorded.scheme != linear.scheme.name:
            line = f"{MANIFEST} says that it is {recorded.scheme}, the source makes it {linear.scheme.name}"
            yield Finding("model", where, line)
        if recorded.block != linear.block:
            line = f"{MANIFEST} says that its block is {recorded.block}, the source's is {linear.block}"
            yield Finding("model", where, line)
