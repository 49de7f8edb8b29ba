"""What every tensor of a shard must hold, from tp_size, layout, padding and tp_rank alone.

These are verify's own rules, from what a tensor is (the operand, its shape). The plan, the placements of
the table of schemes and the slices that a manifest records take no part in them, so that a mistake there is a
difference here.

R tp_size, r tp_rank, I intermediate_size, H hidden_size, L = I/R the rank's share (of the padded I where the set is
padded). A tensor is a grid: rows are dim 0, columns the elements of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reshard.checks.finding import Finding
from reshard.errors import HeaderError, MismatchError
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST
from reshard.model.parts import Module, Parallel
from reshard.schemes.table import Operand, Shape, TensorRule
from reshard.source.base import Source, read_header
from reshard.tensors.header import Header
from reshard.verification.reference import Grid, LinearGrids, zero_grid


@dataclass(frozen=True)
class Piece:
    """A rectangle of a shard tensor, and where in the source tensor `grid` it is from."""

    row: int
    column: int
    rows: int
    columns: int
    grid: Grid
    from_row: int = 0
    from_column: int = 0


@dataclass(frozen=True)
class Expected:
    """What a shard must hold under a name: the pieces cover every element, some (held once for two) twice."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def expect(
    module: Module, name: str, linears: Sequence[LinearGrids], manifest: Manifest, tp_rank: int
) -> list[Expected]:
    """The tensors of a module in one rank's shard. linears: the source's that are stacked in it, or the one that it is.

    Raises MismatchError where the manifest's sizes give the ranks no equal shares of whole blocks.
    """
    by_rows = module.parallel is Parallel.COLUMN
    share = _share(manifest, linears[0], 0 if by_rows else 1)
    found = []
    for rule in linears[0].variant.tensors:
        grids = [linear.tensors[rule.suffix] for linear in linears]
        block = linears[0].block if rule.in_blocks else None
        if rule.shape is Shape.ONE:  # of the whole linear, each that is stacked
            shape, pieces = grids[0].shape, [_whole(grid) for grid in grids]
        elif by_rows:
            shape, pieces = _column_parallel(grids, block, share, tp_rank)
        else:
            shape, pieces = _row_parallel(grids[0], rule, block, share, tp_rank)
        found.append(Expected(f"{name}.{rule.suffix}", grids[0].dtype, shape, tuple(pieces)))
    return found


def _share(manifest: Manifest, linear: LinearGrids, dim: int) -> int:
    """L, of the weight's dim that is cut."""
    size, tp_size = linear.tensors["weight"].shape[dim], manifest.tp_size
    padded = manifest.padding.padded if manifest.padding else size
    multiple = manifest.what.padded_to
    if (multiple > 1 and not size <= padded < size + multiple) or padded % multiple:
        raise MismatchError(f"{MANIFEST}: {size} is padded to {padded}, engines pad it to a multiple of {multiple}")
    share, left = divmod(padded, tp_size)
    if left or padded < size:
        raise MismatchError(
            f"{MANIFEST}: {manifest.what.size} {size} (padded: {padded}) has no equal shares for tp {tp_size}"
        )
    if linear.block is not None and (tp_size > 1 or manifest.what.stacks(manifest.layout)):
        multiple = linear.block[dim]
        if share % multiple:
            raise MismatchError(
                f"{MANIFEST}: a rank's share of {share} is not a multiple of the {multiple}-wide scale block"
            )
    return share


def _column_parallel(
    grids: Sequence[Grid], block: tuple[int, int] | None, share: int, tp_rank: int
) -> tuple[tuple[int, ...], list[Piece]]:
    """Cut along the rows, then stacked: the rank's rows of the first (gate), then the same rows of the next (up)."""
    shape, columns = grids[0].shape, grids[0].columns
    local = -(-share // block[0]) if block else share
    pieces = []
    for position, grid in enumerate(grids):
        start = min(tp_rank * local, grid.rows)
        rows = min(local, grid.rows - start)
        pieces.append(Piece(position * local, 0, rows, columns, grid, start, 0))
        pieces.append(_zeros(grid, position * local + rows, 0, local - rows, columns))
    return (local * len(grids), *shape[1:]), pieces


def _row_parallel(
    grid: Grid, rule: TensorRule, block: tuple[int, int] | None, share: int, tp_rank: int
) -> tuple[tuple[int, ...], list[Piece]]:
    """Cut along the columns (down); what belongs to its rows, the output channels, every rank holds whole."""
    if rule.operand is Operand.BIAS:
        # The ranks' results are added, and a bias may be added only once.
        return grid.shape, [_whole(grid) if tp_rank == 0 else _zeros(grid, 0, 0, grid.rows, grid.columns)]
    if rule.shape in (Shape.CHANNEL, Shape.OUT):
        return grid.shape, [_whole(grid)]
    local = -(-share // block[1]) if block else share
    start = min(tp_rank * local, grid.columns)
    columns = min(local, grid.columns - start)
    kept = Piece(0, 0, grid.rows, columns, grid, 0, start)
    return (grid.rows, local), [kept, _zeros(grid, 0, columns, grid.rows, local - columns)]


def _whole(grid: Grid) -> Piece:
    return Piece(0, 0, grid.rows, grid.columns, grid)


def _zeros(like: Grid, row: int, column: int, rows: int, columns: int) -> Piece:
    """What nothing of the source fills."""
    return Piece(row, column, rows, columns, zero_grid(like.dtype, rows, columns))


def read_headers(shards: Source, manifest: Manifest) -> tuple[dict[int, Header], list[Finding]]:
    """The shards' headers by rank, and a finding for each that cannot be had."""
    headers, findings = {}, []
    for shard in manifest.shards:
        try:
            if shard.file in shards.files():
                headers[shard.tp_rank] = read_header(shards, shard.file)
            else:
                findings.append(Finding("file", shard.file, f"missing; {MANIFEST} names it"))
        except HeaderError as error:
            findings.append(Finding("header", shard.file, str(error)))
    return headers, findings


def misfits(
    manifest: Manifest, headers: Mapping[int, Header], expected: Mapping[int, Sequence[Expected]]
) -> Iterator[Finding]:
    """Tensors that a shard lacks, or that are of another type or shape."""
    for rank, tensors in expected.items():
        for tensor in tensors:
            where = f"{manifest.shards[rank].file}: {tensor.name}"
            info = headers[rank].tensors.get(tensor.name)
            if info is None:
                yield Finding("names", where, f"missing; it must be {tensor.dtype} {list(tensor.shape)}")
            elif info.dtype != tensor.dtype:
                yield Finding("dtype", where, f"is {info.dtype}, must be {tensor.dtype}")
            elif info.shape != tensor.shape:
                yield Finding("shape", where, f"is {list(info.shape)}, must be {list(tensor.shape)}")
