"""A checkpoint's split parts, described: which layers, which tensors, where their bytes lie. No tensor data is read.

Whatever the source is, a tensor is a grid of bytes (rows of dim 0, `row_bytes` each) covered by extents of files: one
extent for a Hugging Face file, one per rank for a shard set.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import cast

from reshard.manifest import Conversion, LinearScheme, ModelDims, SourceFile
from reshard.model.activation import Activation
from reshard.model.naming import linear_name, module_name
from reshard.model.parts import DENSE_FFN, Module, Part
from reshard.schemes.table import Variant
from reshard.tensors.dtypes import itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """A rectangle of a tensor's byte grid, and where a file holds it: its first byte, and the bytes from row to row."""

    file: str
    offset: int
    stride: int
    row: int
    column: int
    rows: int
    width: int


@dataclass(frozen=True)
class Tensor:
    """A tensor under its Hugging Face name. With a conversion, `extents` is empty: its values are computed.

    Where a checkpoint stacks linears (gate and up), each is a run of rows of one stored tensor: of `whole`, from
    `first_row`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    conversion: Conversion | None = None
    whole: "Tensor | None" = None
    first_row: int = 0

    def within(self, file: str, start: int) -> "Tensor":
        """The same as it lies whole in a file, from byte `start` on."""
        whole = Extent(file, start, self.row_bytes, 0, 0, self.rows, self.row_bytes)
        return replace(self, extents=(whole,))

    @property
    def stored(self) -> "Tensor":
        """The tensor that the files hold."""
        return self.whole or self

    def run(self, first_row: int, rows: int) -> "Tensor":
        """`rows` rows of it, as a tensor that is stored within this one."""
        extents = []
        for extent in self.extents:
            top, bottom = max(first_row, extent.row), min(first_row + rows, extent.row + extent.rows)
            if top < bottom:
                offset = extent.offset + (top - extent.row) * extent.stride
                extents.append(replace(extent, offset=offset, row=top - first_row, rows=bottom - top))
        shape = (rows, *self.shape[1:])
        return replace(self, shape=shape, extents=tuple(extents), whole=self, first_row=first_row)

    @property
    def rows(self) -> int:
        """Rows of the byte grid: dim 0, or 1 for a tensor of no dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the grid."""
        return prod(self.shape[1:]) * itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Linear:
    """One of a layer's linears: what it is quantized as, its scale block, its tensors by suffix."""

    variant: Variant
    block: tuple[int, int] | None
    tensors: Mapping[str, Tensor]

    @property
    def scale_block(self) -> tuple[int, int] | None:
        """The block, where scales stand for blocks."""
        return self.block if self.variant.in_blocks else None

    @property
    def entry(self) -> LinearScheme:
        """What the manifest says of it."""
        return LinearScheme(scheme=self.variant.scheme, block=self.scale_block)


@dataclass(frozen=True)
class Layer:
    """A part's linears in one layer, by role, or in the model where that has them once: then `index` is None.

    `activation` is None where nothing stands between them, or nothing says what does.
    """

    index: int | None
    linears: Mapping[str, Linear]
    prefix: str
    activation: Activation | None
    part: Part = DENSE_FFN

    @property
    def number(self) -> int:
        """The index, in a part that layers have."""
        return cast("int", self.index)

    @property
    def module(self) -> str:
        """The name of what holds the linears."""
        return module_name(self.prefix, self.index, self.part)

    def name(self, linear: str) -> str:
        """The name of a linear, or of what stacks some."""
        return linear_name(self.prefix, self.index, linear, self.part)

    def modules(self, layout: str) -> Iterator[tuple[Module, tuple[Linear, ...]]]:
        """What a shard has of it, each with the linears that are stacked in it."""
        for module in self.part.laid_out(layout):
            yield module, tuple(self.linears[role.name] for role in module.roles)

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the layer."""
        for role in self.part.roles:
            yield from self.linears[role.name].tensors.values()

    def stored(self) -> Iterable[Tensor]:
        """Every tensor that the files hold of the layer: linears that are stored stacked, once."""
        return {tensor.stored.name: tensor.stored for tensor in self.tensors()}.values()


@dataclass(frozen=True)
class Identity:
    """Where the weights come from; a re-cut keeps the identity of what was first cut, its sample too."""

    kind: str
    name: str
    commit: str | None
    files: tuple[SourceFile, ...]
    sample: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a source has of the split parts. `side_files` (config.json, the description) go with every shard set.

    `total_tensors` and `total_bytes` count all of the source, the rest included.
    """

    identity: Identity
    model: ModelDims
    layers: tuple[Layer, ...]
    side_files: Mapping[str, bytes]
    total_tensors: int
    total_bytes: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def part(self) -> Part:
        """The part that its layers are of."""
        return self.layers[0].part

    @property
    def shared_size(self) -> int:
        """The size that is shared out over the group, of the model."""
        return self.part.shared_size(self.model)

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor that is split, layer by layer."""
        for layer in self.layers:
            yield from layer.tensors()

    def stored(self) -> Iterable[Tensor]:
        """Every tensor that the files hold of these, layer by layer."""
        for layer in self.layers:
            yield from layer.stored()

    @property
    def nbytes(self) -> int:
        """Bytes of these."""
        return sum(tensor.nbytes for tensor in self.stored())
