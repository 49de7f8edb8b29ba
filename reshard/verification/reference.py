"""What a set's tensors are to be made of: the source's, converted where the set says so, as rows of bytes.

Nothing here comes from the code that plans and writes shards. Files are read by this module's own account of `Operand`,
and converted values are computed in numpy, where the writer uses torch. float32 throughout, one rounding at the end.

Shapes: [out, in] is a linear's weight, n rows of it are [n, in]; (b, k) is its scale block.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from reshard.checkpoint.description import Linear, Tensor
from reshard.convert.rules import BF16, CAST, DEQUANTIZE, MODELSLIM, QUANTIZE, W8A8, target
from reshard.errors import MismatchError, SourceError
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST
from reshard.schemes.declare import COMPRESSED_TENSORS
from reshard.schemes.table import SCHEMES, Operand, Scheme, Variant
from reshard.source.base import Source
from reshard.tensors.dtypes import itemsize
from reshard.tensors.memory import Bytes, Memory
from reshard.tensors.numeric import F32, Array, f32_to_bf16, storage, to_f32

BLOCK_BYTES = 1 << 21  # of stored rows: what each of 128 ranks has of them is still 16 KB
BLOCK_ELEMENTS = 1 << 17  # of computed values: their float32 and float64 copies fit into a core's cache
WORKERS = min(8, len(os.sched_getaffinity(0)))  # each at its own block: memory stays at WORKERS times a few MB

_MEMORY = Memory()
_INT8_MAX = np.float32(127)

Values = Callable[[Bytes, int], F32]
"""(n rows as they are stored, the first one's number) -> [n, in] float32; of their first columns, if they are cut."""


@dataclass(frozen=True)
class Grid:
    """A tensor as rows of bytes: `fetch(top, bottom)` gives rows top..bottom of dim 0 as [bottom - top, row_bytes]."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[int, int], Bytes]
    made_by: str | None = None

    @property
    def is_zeros(self) -> bool:
        """Whether it is of no tensor (`zero_grid`)."""
        return not self.name

    @property
    def rows(self) -> int:
        """Dim 0, or 1 for a tensor of no dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * itemsize(self.dtype)

    def numbers(self, rows: Bytes) -> F32:
        """What rows, or parts of them, hold, as float32."""
        return to_f32(rows.view(storage(self.dtype)), self.dtype)

    def all_values(self) -> F32:
        """The whole of a small tensor, [rows, columns]."""
        return self.numbers(self.fetch(0, self.rows))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row ranges that together are the whole, each about as large as it is to be at once."""
        row, size = (self.columns, BLOCK_ELEMENTS) if self.made_by else (self.row_bytes, BLOCK_BYTES)
        height = max(1, size // max(1, row))
        for top in range(0, self.rows, height):
            yield top, min(top + height, self.rows)


@dataclass(frozen=True)
class LinearGrids:
    """A linear's tensors by suffix, which are those of `variant`; with a `block`, scales are in blocks."""

    variant: Variant
    block: tuple[int, int] | None
    tensors: Mapping[str, Grid]

    @property
    def scheme(self) -> Scheme:
        """How to compute with them."""
        return SCHEMES[self.variant.scheme]

    @property
    def operands(self) -> dict[Operand, Grid]:
        """The tensors by what they are."""
        return {rule.operand: self.tensors[rule.suffix] for rule in self.variant.tensors}


def stored_grid(source: Source, tensor: Tensor, memory: Memory = _MEMORY) -> Grid:
    """A tensor whose bytes lie in files. What is fetched is valid until the thread's next fetch into that memory."""
    return Grid(tensor.name, tensor.dtype, tensor.shape, partial(_fetch, source, tensor, memory))


def zero_grid(dtype: str, rows: int, columns: int, name: str = "", made_by: str | None = None) -> Grid:
    """Zeros."""
    size = columns * itemsize(dtype)
    return Grid(name, dtype, (rows, columns), lambda top, bottom: np.zeros((bottom - top, size), np.uint8), made_by)


def _fetch(source: Source, tensor: Tensor, memory: Memory, top: int, bottom: int) -> Bytes:
    """Rows top..bottom, put together from the parts that hold some of them."""
    out = memory.shaped(bottom - top, tensor.row_bytes)
    covered = 0
    for part in tensor.extents:
        first, last = max(top, part.row), min(bottom, part.row + part.rows)
        if first >= last:
            continue
        start = part.offset + (first - part.row) * part.stride
        block = out[first - top : last - top, part.column : part.column + part.width]
        source.read_rows(block, part.file, start, part.stride)
        covered += block.size
    if covered != out.size:
        raise SourceError(f"{tensor.name}: no file holds all of rows {top} to {bottom}; the source is incomplete")
    return out


def stored_linear(source: Source, linear: Linear) -> LinearGrids:
    """A linear as the source has it, not converted."""
    grids = {suffix: stored_grid(source, tensor) for suffix, tensor in linear.tensors.items()}
    return LinearGrids(linear.variant, linear.block, grids)


class Reference:
    """A source's linears, as a manifest says that they were converted."""

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self._source = source
        self._rules: dict[str, set[str | None]] = {}
        self._names = {tensor.name for shard in manifest.shards for tensor in shard.tensors}
        for shard in manifest.shards:
            for tensor in shard.tensors:
                rule = tensor.conversion.rule if tensor.conversion else None
                self._rules.setdefault(tensor.name.rpartition(".")[0], set()).add(rule)

    def linear(self, linear: Linear, module: str) -> LinearGrids:
        """What the linear is in the shards, where it goes into `module`.

        Raises MismatchError where the conversion that the manifest names is none that the linear can undergo.
        """
        rules = self._rules.get(module, {None})
        if len(rules) > 1:
            both = " and ".join(sorted(str(rule) for rule in rules))
            raise MismatchError(f"{MANIFEST} gives its tensors different conversions: {both}")
        (rule,) = rules
        found = stored_linear(self._source, linear)
        stored, before = found.tensors, linear.tensors["weight"].conversion
        if rule is None or (before and before.rule == rule):  # a source that is a converted set itself
            return found
        _check_rule(rule, found)
        values = scaled(stored["weight"], found.operands.get(Operand.SCALE), linear.block)
        if rule == QUANTIZE:
            with_offset = f"{module}.weight_offset" in self._names
            made_in = target(W8A8, MODELSLIM if with_offset else COMPRESSED_TENSORS)
            return LinearGrids(made_in, None, _Quantized(stored["weight"], values, with_offset).grids())
        weight = stored["weight"]

        def rounded(top: int, bottom: int) -> Bytes:
            return _bytes(f32_to_bf16(values(weight.fetch(top, bottom), top)))

        return LinearGrids(target(BF16), None, {"weight": Grid(weight.name, "BF16", weight.shape, rounded, rule)})


def _check_rule(rule: str, linear: LinearGrids) -> None:
    """Whether the linear's values are in the form that the rule starts from."""
    weight, scheme = linear.tensors["weight"], linear.scheme
    fits = {
        QUANTIZE: bool(scheme.becomes),
        DEQUANTIZE: bool(scheme.becomes) and not scheme.is_float,
        CAST: scheme.is_float and weight.dtype in {"F16", "F32"},
    }
    if not fits.get(rule, False):
        having = ", ".join(f"{suffix} {grid.dtype}" for suffix, grid in linear.tensors.items())
        raise MismatchError(f"{MANIFEST} says {rule}, which does not apply to the source's {weight.name} ({having})")


def scaled(weight: Grid, scale: Grid | None, block: tuple[int, int] | None) -> Values:
    """The values weight * scale, float32.

    scale: none, [1], [out, 1] or [out], or with a block [ceil(out/b), ceil(in/k)].
    """
    if scale is None:
        return lambda rows, top: weight.numbers(rows)
    factors = scale.all_values()  # [out, 1], or one a block

    def values(rows: Bytes, top: int) -> F32:
        found = weight.numbers(rows)
        bottom, columns = top + len(found), found.shape[1]
        if block is None:
            found *= factors if len(factors) == 1 else factors[top:bottom]
            return found
        tall = factors[np.arange(top, bottom) // block[0]]
        found *= np.repeat(tall, block[1], axis=1)[:, :columns]
        return found

    return values


class _Quantized:
    """int8 with one scale per output channel: scale = max|w| / 127 over the row, q = round(w / scale), symmetric.

    With an offset (ModelSlim's form) the scale is F32, without it BF16, and rounded to that before it divides.
    """

    def __init__(self, weight: Grid, values: Values, with_offset: bool) -> None:
        self._weight, self._values = weight, values
        self._form = "F32" if with_offset else "BF16"
        self._scales: F32 = np.full((weight.rows, 1), np.nan, np.float32)  # NaN: not known yet

    def grids(self) -> dict[str, Grid]:
        """The tensors by suffix."""
        name, (rows, _) = self._weight.name, self._weight.shape
        module = name.rpartition(".")[0]
        channel = (rows, 1)
        grids = {
            "weight": Grid(name, "I8", self._weight.shape, self._levels, QUANTIZE),
            "weight_scale": Grid(f"{module}.weight_scale", self._form, channel, self._scale, QUANTIZE),
        }
        if self._form == "F32":
            grids["weight_offset"] = zero_grid("F32", rows, 1, f"{module}.weight_offset", QUANTIZE)
        return grids

    def _levels(self, top: int, bottom: int) -> Bytes:
        values = self._values(self._weight.fetch(top, bottom), top)
        # max|w| without a copy of |w|
        largest = np.maximum(values.max(axis=1, keepdims=True), -values.min(axis=1, keepdims=True))
        scales = largest / _INT8_MAX
        if self._form == "BF16":
            scales = to_f32(f32_to_bf16(scales), "BF16")
        scales = np.where(scales == 0, np.float32(1), scales)
        self._scales[top:bottom] = scales
        values /= scales
        np.rint(values, out=values)
        np.clip(values, -_INT8_MAX, _INT8_MAX, out=values)
        return _bytes(values.astype(np.int8))

    def _scale(self, top: int, bottom: int) -> Bytes:
        # Mostly known by now: the weight comes first.
        for first, last in self._weight.blocks():
            if first < bottom and last > top and np.isnan(self._scales[first:last]).any():
                self._levels(first, last)
        scales = self._scales[top:bottom]
        return _bytes(scales if self._form == "F32" else f32_to_bf16(scales))


def _bytes(values: Array) -> Bytes:
    """[n, columns] of any type as [n, row_bytes]."""
    return np.ascontiguousarray(values).view(np.uint8)
