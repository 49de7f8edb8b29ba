"""The plan: every shard's tensors as slices of source tensors. Pure: no input, no output, the same every time.

R tp_size, r tp_rank, S the size that a part shares out, L = S'/R the rank's share of the padded S' (S' = S without
padding). A column-parallel linear is cut along dim 0 (rows r·L..(r+1)·L), a row-parallel one along dim 1; what stands
for blocks is cut in blocks. Stacked linears are each cut first.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import lcm

from reshard.checkpoint.description import Checkpoint, Layer, Linear, Tensor
from reshard.errors import AlignmentError
from reshard.manifest import Conversion, Padding, Shard, ShardTensor, Slice
from reshard.model.naming import MAX_TP_SIZE, ShardName
from reshard.model.parts import Module, Parallel
from reshard.schemes.table import Placement
from reshard.tensors.dtypes import itemsize, nbytes
from reshard.tensors.header import encode_header

ALIGNMENT = 4096  # bytes; tensor data begins on it, so that a shard can be mapped or read past the page cache
_SHOWN_SIZES = 12


@dataclass(frozen=True)
class PlannedTensor:
    """A manifest's tensor before it has a digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    same_as: tuple[str, ...] = ()
    conversion: Conversion | None = None

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

    def entry(self, blake3: str) -> ShardTensor:
        """The manifest's."""
        return ShardTensor(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            blake3=blake3,
            slices=self.slices,
            same_as=self.same_as,
            conversion=self.conversion,
        )


@dataclass(frozen=True)
class PlannedShard:
    """One rank's file: its tensors in file order."""

    name: ShardName
    tensors: tuple[PlannedTensor, ...]

    @property
    def tp_rank(self) -> int:
        """The rank that it is of."""
        return self.name.tp_rank

    @property
    def file(self) -> str:
        """Its name."""
        return self.name.file

    @cached_property
    def header(self) -> bytes:
        """What stands before the tensors."""
        entries = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}
        return encode_header(entries, self.name.metadata, ALIGNMENT)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def entry(self, blake3: str, digests: Iterable[str]) -> Shard:
        """The manifest's: with the BLAKE3 of the file, and of each tensor in file order."""
        tensors = [tensor.entry(digest) for tensor, digest in zip(self.tensors, digests, strict=True)]
        return Shard(tp_rank=self.tp_rank, file=self.file, size=self.size, blake3=blake3, tensors=tensors)


@dataclass(frozen=True)
class Plan:
    """What a split writes. part: its key."""

    part: str
    tp_size: int
    layout: str
    padding: Padding | None
    shards: tuple[PlannedShard, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class Ways:
    """What a command has to offer where the sizes do not allow a cut.

    takes: whether its other checks take a size; no other is advised. pad, bf16: its options.
    """

    takes: Callable[[int], bool] = lambda tp_size: True
    pad: str = "--pad"
    bf16: str = "--weights bf16"


RE_SHARDED = Ways(pad="reshard split --pad", bf16="reshard split --weights bf16")
"""Of a set, which is cut again by another command than the one that speaks."""


def make_plan(
    checkpoint: Checkpoint,
    tp_size: int,
    layout: str = "fused",
    pad: bool = False,
    tp_ranks: Iterable[int] | None = None,
    ways: Ways = Ways(),
) -> Plan:
    """Cut a checkpoint for `tp_size` ranks, or plan some of these only: every rank's shapes are the same.

    Raises AlignmentError, with the sizes that work and the other ways out, where it cannot be.
    """
    padding = _padding(checkpoint, tp_size, layout, pad, ways)
    share = (padding.padded if padding else checkpoint.shared_size) // tp_size
    shards = [
        _shard(
            [
                tensor
                for layer in checkpoint.layers
                for module, linears in layer.modules(layout)
                for tensor in _tensors(layer.name(module.name), module, linears, share, tp_rank)
            ],
            ShardName(checkpoint.part.key, tp_rank, tp_size),
        )
        for tp_rank in (range(tp_size) if tp_ranks is None else tp_ranks)
    ]
    return Plan(checkpoint.part.key, tp_size, layout, padding, tuple(shards))


def required_multiple(layers: Iterable[Layer]) -> int:
    """What a rank's share must be a multiple of: the scale blocks' sizes along what is cut, or 1."""
    return lcm(
        *(
            block[role.parallel.value]
            for layer in layers
            for role in layer.part.roles
            if (block := layer.linears[role.name].scale_block)
        )
    )


def working_sizes(size: int, multiple: int) -> list[int]:
    """The tp sizes that give every rank a whole multiple of `multiple` of `size`."""
    shares = size // multiple if size % multiple == 0 else 0
    return [tp_size for tp_size in range(1, min(shares, MAX_TP_SIZE) + 1) if shares % tp_size == 0]


def _padding(checkpoint: Checkpoint, tp_size: int, layout: str, pad: bool, ways: Ways) -> Padding | None:
    """What it takes to give each rank an equal share of whole blocks, of a size that engines may pad first."""
    part, size, multiple = checkpoint.part, checkpoint.shared_size, required_multiple(checkpoint.layers)
    padded = part.padded(size)
    by_engines = f", which engines pad to {padded}" if padded != size else ""
    if tp_size < 1:
        raise AlignmentError(f"tp {tp_size}: the {part.name} group has at least one rank; use a tp from 1")
    if tp_size > (most := min(padded, MAX_TP_SIZE)):
        raise AlignmentError(f"tp {tp_size} is greater than {part.size} {size}{by_engines}; use at most {most}")
    if padded % (tp_size * multiple) == 0 or (tp_size == 1 and not part.stacks(layout)):
        return Padding(padded=padded, multiple=part.padded_to) if by_engines else None
    if pad and part.may_pad:
        share = -(-size // (tp_size * multiple)) * multiple
        return Padding(padded=share * tp_size, multiple=multiple)
    layer, role = next(
        (
            (layer, role)
            for layer in checkpoint.layers
            for role in part.roles
            if (block := layer.linears[role.name].scale_block) and padded % (tp_size * block[role.parallel.value])
        ),
        (checkpoint.layers[0], part.roles[0]),
    )
    dim = role.parallel.value
    what = f"{layer.name(role.name)}.weight: dim {dim} = {size}{by_engines}{',' if by_engines else ''}"
    unit = ("row", "column")[dim]
    sizes = _shown(padded, multiple, ways)
    use = [f"a tp of {sizes}"] if sizes else []
    use += [f"{ways.pad} to add zero {unit}s"] if part.may_pad else []
    found = "; or ".join(use)
    if multiple == 1:
        raise AlignmentError(f"{what} is not divisible by tp {tp_size}; {f'use {found}' if found else _NO_SIZE}")
    if padded % tp_size == 0:
        found += f"{', or ' if found else ''}{ways.bf16}"
    elif not found and (unscaled := _shown(padded, 1, ways)):
        found = f"{ways.bf16}, and a tp of {unscaled}"
    raise AlignmentError(
        f"{what} over tp {tp_size} gives {padded / tp_size:g} {unit}s, not a multiple of the {multiple}-{unit} scale "
        f"block; {f'use {found}' if found else _NO_SIZE}"
    )


_NO_SIZE = "no size cuts it"


def _shown(size: int, multiple: int, ways: Ways) -> str:
    """The first sizes that work, and that the command's other checks take."""
    first = list(islice(filter(ways.takes, working_sizes(size, multiple)), _SHOWN_SIZES + 1))
    return ", ".join(map(str, first[:_SHOWN_SIZES])) + (", …" if len(first) > _SHOWN_SIZES else "")


def _tensors(name: str, module: Module, linears: Sequence[Linear], share: int, tp_rank: int) -> Iterator[PlannedTensor]:
    """The tensors of a module on one rank."""
    for rule in linears[0].variant.tensors:
        tensors = [linear.tensors[rule.suffix] for linear in linears]
        cut = rule.column if module.parallel is Parallel.COLUMN else rule.row
        first, shape = tensors[0], list(tensors[0].shape)
        same_as: tuple[str, ...] = ()
        slices: list[Slice] = []
        if cut.dim is None:
            same_as = tuple(tensor.name for tensor in tensors[1:] if tensor.name != first.name)
            if cut is Placement.REPLICATED or tp_rank == 0:
                slices.append(_slice(first, 0, 0, first.rows, 0))
        else:
            block = linears[0].block if rule.in_blocks else None
            local, extent = -(-share // (block[cut.dim] if block else 1)), shape[cut.dim]
            shape[cut.dim] = local * len(tensors)
            start, stop = min(tp_rank * local, extent), min((tp_rank + 1) * local, extent)
            if start < stop:
                slices += [_slice(tensor, cut.dim, start, stop, at * local) for at, tensor in enumerate(tensors)]
        yield PlannedTensor(
            f"{name}.{rule.suffix}", first.dtype, tuple(shape), tuple(slices), same_as, _stacked_conversion(tensors)
        )


def _slice(tensor: Tensor, dim: int, start: int, stop: int, at: int) -> Slice:
    """Of what is stored: where linears are stored stacked, their rows are counted in the stack."""
    first, stored = tensor.first_row, tensor.stored
    return Slice(tensor=stored.name, shape=stored.shape, dim=dim, start=first + start, stop=first + stop, at=at)


def _stacked_conversion(tensors: Sequence[Tensor]) -> Conversion | None:
    first = tensors[0].conversion
    if first is None:
        return None
    return Conversion(
        rule=first.rule, inputs=tuple(name for t in tensors if t.conversion for name in t.conversion.inputs)
    )


def _shard(tensors: Sequence[PlannedTensor], name: ShardName) -> PlannedShard:
    """Order a rank's tensors.

    First what is a whole number of pages, the biggest first, so that each begins on one; then the rest by element
    size, so that each begins on a multiple of its own.
    """
    ordered = sorted(
        tensors,
        key=lambda t: (0, 0, -t.nbytes) if t.nbytes % ALIGNMENT == 0 else (1, -itemsize(t.dtype), -t.nbytes),
    )
    return PlannedShard(name, tuple(ordered))
