"""A checkpoint's DenseFFN, described: which layers, which tensors, where their bytes lie. No tensor data is read.

Whatever the source is, a tensor is a grid of bytes (rows of dim 0, `row_bytes` each) covered by rectangles of files:
one rectangle for a Hugging Face file, one per rank for a shard set.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from reshard.model.activation import Activation
from reshard.model.naming import ROLES, mlp_name
from reshard.schemes import Variant
from reshard.tensors.dtypes import itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a tensor's byte grid, and where a file holds it: its first byte, and the bytes from row to row."""

    file: str
    offset: int
    stride: int
    row: int
    column: int
    rows: int
    width: int


@dataclass(frozen=True)
class Conversion:
    """How a tensor was made from others, by name; `rule` is in reshard.convert.rules."""

    rule: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor under its Hugging Face name. With a conversion, `parts` is empty: its values are computed.

    Where a checkpoint stacks gate and up, each is a run of rows of one stored tensor: of `whole`, from `first_row`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    conversion: Conversion | None = None
    whole: "Tensor | None" = None
    first_row: int = 0

    @property
    def stored(self) -> "Tensor":
        """The tensor that the files hold."""
        return self.whole or self

    def run(self, first_row: int, rows: int) -> "Tensor":
        """`rows` rows of it, as a tensor that is stored within this one."""
        parts = []
        for part in self.parts:
            top, bottom = max(first_row, part.row), min(first_row + rows, part.row + part.rows)
            if top < bottom:
                offset = part.offset + (top - part.row) * part.stride
                parts.append(replace(part, offset=offset, row=top - first_row, rows=bottom - top))
        return replace(self, shape=(rows, *self.shape[1:]), parts=tuple(parts), whole=self, first_row=first_row)

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
    """One of a layer's three linears: what it is quantized as, its scale block, its tensors by suffix."""

    variant: Variant
    block: tuple[int, int] | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A dense layer: its index and its linears by role.

    `activation` is None where nothing says what stands between them.
    """

    index: int
    linears: Mapping[str, Linear]
    prefix: str
    activation: Activation | None

    @property
    def module(self) -> str:
        """The name of its MLP; a linear's is `{module}.{role}`."""
        return mlp_name(self.prefix, self.index)

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the layer."""
        for role in ROLES:
            yield from self.linears[role].tensors.values()

    def stored(self) -> Iterable[Tensor]:
        """Every tensor that the files hold of the layer: gate and up once where they are stacked."""
        return {tensor.stored.name: tensor.stored for tensor in self.tensors()}.values()


@dataclass(frozen=True)
class Model:
    """The sizes that the cut depends on, and what precedes the layers' names (reshard.model.naming).

    `num_hidden_layers` is None without a config.json.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int | None
    prefix: str


@dataclass(frozen=True)
class SourceFile:
    """A file that tensors were taken from: enough to know it again."""

    name: str
    size: int
    header_digest: str


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
    """A source's DenseFFN. `side_files` (config.json, the description) go with every shard set.

    `total_tensors` and `total_bytes` count all of the source, the rest included.
    """

    identity: Identity
    model: Model
    layers: tuple[Layer, ...]
    side_files: Mapping[str, bytes]
    total_tensors: int
    total_bytes: int
    warnings: tuple[str, ...] = field(default=())

    def tensors(self) -> Iterable[Tensor]:
        """Every DenseFFN tensor, layer by layer."""
        for layer in self.layers:
            yield from layer.tensors()

    def stored(self) -> Iterable[Tensor]:
        """Every tensor that the files hold of the DenseFFN, layer by layer."""
        for layer in self.layers:
            yield from layer.stored()

    @property
    def nbytes(self) -> int:
        """Bytes of the DenseFFN."""
        return sum(tensor.nbytes for tensor in self.stored())


def numbers(values: Iterable[int]) -> str:
    """Layer numbers, runs shortened: 0-2, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def layers_named(values: Collection[int]) -> str:
    """The same with its noun: layer 7, layers 0-2."""
    return f"layer{'s' if len(values) != 1 else ''} {numbers(values)}"
