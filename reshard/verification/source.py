"""Every byte of a shard set against the source it was cut from, and what is computed with them, read once for both.

What each shard tensor must hold comes from reshard.verification.expect, what the source holds from
reshard.verification.reference: nothing of the code that made the set is trusted, nor the slices that its manifest
records.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.checkpoint.description import Checkpoint, Layer, Tensor
from reshard.checks.finding import Finding
from reshard.checks.provenance import compare_identity, compare_model
from reshard.errors import MismatchError
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST, linear_name
from reshard.model.parts import Module
from reshard.source.base import Source
from reshard.tensors.dtypes import itemsize
from reshard.tensors.header import Header
from reshard.tensors.memory import Bytes, Memory
from reshard.tensors.numeric import storage, to_f32
from reshard.verification.compute import Computations, LayerResult, Sides
from reshard.verification.expect import Expected, Piece, expect, misfits, read_headers
from reshard.verification.linear import Product
from reshard.verification.reference import WORKERS, Grid, LinearGrids, Reference, stored_grid
from reshard.workers import Workers

Tick = Callable[[int], None]
_MEMORY = Memory()


def compare_with_source(
    shards: Source, manifest: Manifest, source: Source, checkpoint: Checkpoint, tick: Tick = lambda n: None
) -> tuple[list[Finding], list[LayerResult]]:
    """What differs, at most one finding for each tensor of a shard and one for each layer's computation; those made.

    checkpoint: `describe(source)`, unconverted. No layer is computed of which a shard lacks a tensor, or has one of
    another type or shape. `tick` is called with the shard bytes of each step.
    """
    findings = [*compare_identity(manifest, checkpoint), *compare_model(manifest, checkpoint)]
    headers, unreadable = read_headers(shards, manifest)
    findings += unreadable
    reference, computations = Reference(source, manifest), Computations(manifest, checkpoint)
    workers = Workers(WORKERS, shards, source)
    wanted: dict[int, set[str]] = {rank: set() for rank in headers}
    for layer in checkpoint.layers:
        _prefetch(shards, manifest, headers, source, layer)
        sides = None if unreadable else computations.of(layer)
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
                sides = None
                continue
            findings += _check_scheme(manifest, layer.index, module, linears[0])
            unfit = list(misfits(manifest, headers, expected))
            findings += unfit
            sides = None if unfit else sides
            held = _held(shards, manifest, headers, expected, {finding.where for finding in unfit})
            findings += _compare_module(workers, module, linears, held, sides, tick)
            for rank, tensors in expected.items():
                wanted[rank] |= {tensor.name for tensor in tensors}
        if sides is not None:
            computations.judge(layer, sides)
    for rank, header in headers.items():
        for name in sorted(header.tensors.keys() - wanted[rank]):
            where = f"{manifest.shards[rank].file}: {name}"
            findings.append(Finding("names", where, "the source calls for no such tensor"))
    return [*findings, *computations.findings()], computations.results


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
class _Held:
    """A tensor that a shard has, and what it must hold."""

    where: str
    suffix: str
    grid: Grid
    pieces: tuple[Piece, ...]


def _held(
    shards: Source,
    manifest: Manifest,
    headers: Mapping[int, Header],
    expected: Mapping[int, Sequence[Expected]],
    unfit: Collection[str],
) -> list[list[_Held]]:
    """In rank order; without those of which `unfit` says where they are missing or of another type or shape."""
    found: list[list[_Held]] = []
    for rank, tensors in expected.items():
        file = manifest.shards[rank].file
        found.append([])
        for one in tensors:
            where = f"{file}: {one.name}"
            if where not in unfit:
                start = headers[rank].tensors[one.name].start
                tensor = Tensor(one.name, one.dtype, one.shape, ()).within(file, start)
                grid = stored_grid(shards, tensor, _MEMORY)
                found[-1].append(_Held(where, one.name.rpartition(".")[2], grid, one.pieces))
    return found


@dataclass(frozen=True)
class _Target:
    """A place that a source tensor, or zeros, or a part of it, went to. product: what the rows there are added to."""

    where: str
    grid: Grid
    piece: Piece
    product: Product | None


@dataclass(frozen=True)
class _Step:
    """Rows of a source tensor, or of zeros. product: what they are added to; targets: where they may have gone."""

    grid: Grid
    product: Product | None
    targets: Sequence[_Target]
    top: int
    bottom: int


def _compare_module(
    workers: Workers,
    module: Module,
    linears: Sequence[LinearGrids],
    held: Sequence[Sequence[_Held]],
    sides: Sides | None,
    tick: Tick,
) -> list[Finding]:
    """A module's tensors in all shards: each row of the source is fetched once, and compared wherever it went."""
    whole: Sequence[Product | None] = [None] * len(linears)
    ranks: Sequence[Product | None] = [None] * len(held)
    if sides is not None:
        like = linears[0]
        slices = [LinearGrids(like.variant, like.block, {one.suffix: one.grid for one in rank}) for rank in held]
        whole, ranks = sides.begin(module, linears, slices)
    targets = [
        _Target(one.where, one.grid, piece, None if piece.grid.is_zeros or one.suffix != "weight" else product)
        for rank, product in zip(held, ranks, strict=True)
        for one in rank
        for piece in one.pieces
        if piece.rows and piece.columns
    ]
    sources = [
        (grid, product if suffix == "weight" else None)
        for linear, product in zip(linears, whole, strict=True)
        for suffix, grid in linear.tensors.items()
    ]
    sources += [(target.piece.grid, None) for target in targets if target.piece.grid.is_zeros]

    def steps() -> Iterator[_Step]:
        for grid, product in sources:
            of_grid = [target for target in targets if target.piece.grid is grid]
            for top, bottom in grid.blocks():
                yield _Step(grid, product, of_grid, top, bottom)

    def compare(step: _Step) -> list[Finding]:
        differences, nbytes = _compare(step)
        tick(nbytes)
        return differences

    found: dict[str, Finding] = {}
    for differences in workers.map(compare, steps()):
        for difference in differences:  # in the order of the steps: a tensor's first one stays
            found.setdefault(difference.where, difference)
    return list(found.values())


@np.errstate(all="ignore")  # a wrong source may hold what is no number: a finding, not a warning
def _compare(step: _Step) -> tuple[list[Finding], int]:
    """Rows with each place that they went to: what differs, and the shard bytes that were looked at."""
    grid, top = step.grid, step.top
    rows = grid.fetch(top, step.bottom)
    if step.product is not None:
        step.product.add(rows, top)
    differences, nbytes = [], 0
    for target in step.targets:
        piece, size = target.piece, itemsize(grid.dtype)
        first, last = max(top, piece.from_row), min(step.bottom, piece.from_row + piece.rows)
        if first >= last:
            continue
        row = piece.row + first - piece.from_row  # in the shard
        got = target.grid.fetch(row, row + last - first)[:, piece.column * size : (piece.column + piece.columns) * size]
        if target.product is not None:
            target.product.add(got, row)
        left = piece.from_column * size
        wanted = rows[first - top : last - top, left : left + piece.columns * size]
        nbytes += got.size
        if not np.array_equal(got, wanted):
            at, column = _first_difference(got, wanted, size)
            got_is, must_be = (_shown(block, at, column, grid.dtype) for block in (got, wanted))
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
