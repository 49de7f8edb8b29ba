"""The plan: every shard's tensors as slices of source tensors. Pure: no input, no output, the same every time.

R tp_size, r tp_rank, I intermediate_size, L = I'/R the rank's share of the padded I' (I' = I without padding).
gate and up are cut along dim 0 (rows r·L..(r+1)·L), down along dim 1; what stands for blocks is cut in blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm

from reshard.checkpoint.description import Checkpoint, Conversion, Layer, Linear, Tensor
from reshard.errors import AlignmentError
from reshard.model.naming import DOWN, GATE, GATE_UP, MAX_TP_SIZE, ROLES, UP, shard_file
from reshard.schemes import Placement, TensorRule
from reshard.tensors.dtypes import itemsize, nbytes
from reshard.tensors.header import encode_header

ALIGNMENT = 4096  # bytes; tensor data begins on it, so that a shard can be mapped or read past the page cache
FORMAT_KEY = "denseffn"
_SHOWN_SIZES = 12


@dataclass(frozen=True)
class Slice:
    """Positions start..stop of `dim` of a source tensor, placed from position `at` of that dim of the shard tensor."""

    tensor: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a shard; bytes that no slice covers are zero. `offset` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    same_as: tuple[str, ...] = ()
    conversion: Conversion | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return nbytes(self.dtype, self.shape)

    def source_block(self, piece: Slice) -> tuple[int, int, int, int]:
        """A slice as a block of its source tensor's byte grid: first row, first byte of a row, rows, bytes of a row."""
        rows, length = self.shape[0] if self.shape else 1, piece.stop - piece.start
        if piece.dim == 0:
            return piece.start, 0, length, self.nbytes // rows
        size = itemsize(self.dtype)
        return 0, piece.start * size, rows, length * size


@dataclass(frozen=True)
class PlannedShard:
    """One rank's file: its header, and its tensors in file order."""

    tp_rank: int
    file: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Padding:
    """I was padded with zeros to `padded_intermediate_size`, so that each share is a multiple of `multiple`."""

    padded_intermediate_size: int
    multiple: int


@dataclass(frozen=True)
class Plan:
    """What a split writes."""

    tp_size: int
    layout: str
    padding: Padding | None
    shards: tuple[PlannedShard, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.size for shard in self.shards)


def make_plan(
    checkpoint: Checkpoint,
    tp_size: int,
    layout: str = "fused",
    pad: bool = False,
    tp_ranks: Iterable[int] | None = None,
) -> Plan:
    """Cut a checkpoint for `tp_size` ranks, or plan some of these only: every rank's shapes are the same.

    Raises AlignmentError, with the sizes that work, where it cannot be.
    """
    padding = _share(checkpoint, tp_size, layout, pad)
    padded = padding.padded_intermediate_size if padding else checkpoint.model.intermediate_size
    shards = []
    for tp_rank in range(tp_size) if tp_ranks is None else tp_ranks:
        tensors = [
            tensor
            for layer in checkpoint.layers
            for tensor in _layer(layer, checkpoint.model.intermediate_size, padded // tp_size, tp_rank, layout)
        ]
        shards.append(_shard(tensors, tp_rank, tp_size))
    return Plan(tp_size, layout, padding, tuple(shards))


def grid(layers: Iterable[Layer]) -> int:
    """What I/R must be a multiple of: the scale blocks' sizes along I, or 1."""
    found = 1
    for layer in layers:
        for role in ROLES:
            linear = layer.linears[role]
            if linear.block and linear.variant.in_blocks:
                found = lcm(found, linear.block[1 if role == DOWN else 0])
    return found


def working_sizes(intermediate_size: int, multiple: int) -> list[int]:
    """The tp sizes that give every rank a whole multiple of `multiple` of I."""
    shares = intermediate_size // multiple if intermediate_size % multiple == 0 else 0
    return [size for size in range(1, min(shares, MAX_TP_SIZE) + 1) if shares % size == 0]


def _share(checkpoint: Checkpoint, tp_size: int, layout: str, pad: bool) -> Padding | None:
    """Whether I can be shared by R, and what padding that takes."""
    model, multiple = checkpoint.model, grid(checkpoint.layers)
    size = model.intermediate_size
    if tp_size < 1:
        raise AlignmentError(f"tp {tp_size}: the DenseFFN group has at least one rank; use a tp from 1")
    if tp_size > min(size, MAX_TP_SIZE):
        raise AlignmentError(
            f"tp {tp_size} is greater than intermediate_size {size}; use at most {min(size, MAX_TP_SIZE)}"
        )
    if size % (tp_size * multiple) == 0 or (tp_size == 1 and layout == "separate"):
        return None
    if pad:
        share = -(-size // (tp_size * multiple)) * multiple
        return Padding(share * tp_size, multiple)
    name = f"{checkpoint.layers[0].module}.{GATE}.weight"
    sizes = working_sizes(size, multiple)
    shown = ", ".join(map(str, sizes[:_SHOWN_SIZES])) + (", …" if len(sizes) > _SHOWN_SIZES else "")
    use = f"use a tp of {shown}; or --pad" if sizes else "use --pad"
    if multiple == 1:
        raise AlignmentError(f"{name}: dim 0 = {size} is not divisible by tp {tp_size}; {use} to add zero rows")
    unscaled = ", or --weights bf16" if size % tp_size == 0 else ""
    raise AlignmentError(
        f"{name}: dim 0 = {size} over tp {tp_size} gives {size / tp_size:g} rows, not a multiple of the "
        f"{multiple}-row scale block; {use} to add zero rows{unscaled}"
    )


def _layer(layer: Layer, intermediate_size: int, share: int, tp_rank: int, layout: str) -> Iterator[PlannedTensor]:
    """One layer's tensors on one rank."""
    gate, up, down = (layer.linears[role] for role in (GATE, UP, DOWN))
    if layout == "fused":
        yield from _linear((gate, up), GATE, f"{layer.module}.{GATE_UP}", intermediate_size, share, tp_rank)
    else:
        for role, linear in ((GATE, gate), (UP, up)):
            yield from _linear((linear,), role, f"{layer.module}.{role}", intermediate_size, share, tp_rank)
    yield from _linear((down,), DOWN, f"{layer.module}.{DOWN}", intermediate_size, share, tp_rank)


def _linear(
    linears: Sequence[Linear], role: str, module: str, intermediate_size: int, share: int, tp_rank: int
) -> Iterator[PlannedTensor]:
    """The tensors of one linear, or of gate and up stacked: each is sliced first and stacked after."""
    for rule in linears[0].variant.tensors:
        tensors = [linear.tensors[rule.suffix] for linear in linears]
        name = f"{module}.{rule.suffix}"
        cut = rule.row if role == DOWN else rule.column
        first, made = tensors[0], _stacked_conversion(tensors)
        if cut.dim is None:
            whole = Slice(first.name, first.shape, 0, 0, first.rows, 0)
            held = (whole,) if cut is Placement.REPLICATED or tp_rank == 0 else ()
            others = tuple(tensor.name for tensor in tensors[1:] if tensor.name != first.name)
            yield PlannedTensor(name, first.dtype, first.shape, held, others, made)
            continue
        unit = _unit(rule, linears[0], cut.dim)
        local, extent = -(-share // unit), first.shape[cut.dim]
        start, stop = min(tp_rank * local, extent), min((tp_rank + 1) * local, extent)
        slices = tuple(
            _slice(tensor, cut.dim, start, stop, position * local)
            for position, tensor in enumerate(tensors)
            if stop > start
        )
        shape = list(first.shape)
        shape[cut.dim] = local * len(tensors)
        yield PlannedTensor(name, first.dtype, tuple(shape), slices, (), made)


def _slice(tensor: Tensor, dim: int, start: int, stop: int, at: int) -> Slice:
    """Of what is stored: where gate and up are stacked, their rows are counted in the stack."""
    return Slice(tensor.stored.name, tensor.stored.shape, dim, tensor.first_row + start, tensor.first_row + stop, at)


def _stacked_conversion(tensors: Sequence[Tensor]) -> Conversion | None:
    first = tensors[0].conversion
    if first is None:
        return None
    return Conversion(first.rule, tuple(name for t in tensors if t.conversion for name in t.conversion.inputs))


def _unit(rule: TensorRule, linear: Linear, dim: int) -> int:
    """How many positions of I one element along `dim` stands for."""
    return linear.block[dim] if rule.in_blocks and linear.block else 1


def _shard(tensors: Sequence[PlannedTensor], tp_rank: int, tp_size: int) -> PlannedShard:
    """Order a rank's tensors and write the header.

    First what is a whole number of pages, the biggest first, so that each begins on one; then the rest by element
    size, so that each begins on a multiple of its own.
    """
    ordered = sorted(
        tensors,
        key=lambda t: (0, 0, -t.nbytes) if t.nbytes % ALIGNMENT == 0 else (1, -itemsize(t.dtype), -t.nbytes),
    )
    placed, at = [], 0
    for tensor in ordered:
        placed.append((tensor, at))
        at += tensor.nbytes
    header = encode_header(
        {tensor.name: (tensor.dtype, tensor.shape, start, start + tensor.nbytes) for tensor, start in placed},
        {"format": "pt", FORMAT_KEY: "shard", "tp_rank": str(tp_rank), "tp_size": str(tp_size)},
        ALIGNMENT,
    )
    return PlannedShard(
        tp_rank,
        shard_file(tp_rank, tp_size),
        header,
        tuple(
            PlannedTensor(t.name, t.dtype, t.shape, t.slices, t.same_as, t.conversion, len(header) + start)
            for t, start in placed
        ),
    )
