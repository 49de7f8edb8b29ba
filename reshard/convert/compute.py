"""The values of converted tensors, block by block. The only module that imports torch.

Shapes: [out, in] is a linear's weight; (b, k) its scale block. All arithmetic is float32, one rounding at the end,
each value on its own: the result is the same whatever the blocks in which it is asked for.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np

from reshard.checkpoint.description import Checkpoint, Linear, Tensor
from reshard.errors import MissingDependencyError, SchemeError
from reshard.schemes.table import Operand
from reshard.source.base import Range, Source
from reshard.tensors.byte_grid import BlockReader, StoredReader
from reshard.tensors.dtypes import TORCH
from reshard.tensors.memory import Bytes
from reshard.tensors.numeric import storage, to_f32

try:
    import torch
except ImportError as error:
    raise MissingDependencyError("--weights", "torch", error) from error

_INT8_MAX = 127
_CHUNK_ELEMENTS = 1 << 20


def computed_readers(source: Source, stored: Checkpoint, checkpoint: Checkpoint) -> dict[str, BlockReader]:
    """A reader for each of the checkpoint's tensors that has no bytes of its own."""
    readers: dict[str, BlockReader] = {}
    for before, after in zip(stored.layers, checkpoint.layers, strict=True):
        for role, made in after.linears.items():
            if made.tensors["weight"].extents:
                continue
            values = _Values(source, before.linears[role])
            scale = made.variant.suffix(Operand.SCALE)
            scales = _RowScales(values, made.tensors[scale].dtype) if scale else None
            for rule in made.variant.tensors:
                tensor = made.tensors[rule.suffix]
                readers[tensor.name] = _Computed(tensor, _compute(tensor, rule.operand, values, scales), values, scales)
    return readers


Compute = Callable[[int, int, int, int], "torch.Tensor"]
"""(first row, row behind the last, first column, column behind the last) -> values in the tensor's own type."""


def _compute(tensor: Tensor, operand: Operand, values: "_Values", scales: "_RowScales | None") -> Compute:
    dtype = _dtype(tensor.dtype)
    if scales is None:
        return lambda *block: _rounded(values.get(*block), dtype)
    if operand is Operand.OFFSET:
        return lambda top, bottom, left, right: torch.zeros((bottom - top, right - left), dtype=dtype)
    if operand is Operand.SCALE:
        return lambda top, bottom, left, right: scales.get()[top:bottom].to(dtype)

    def quantize(top: int, bottom: int, left: int, right: int) -> "torch.Tensor":
        scaled = values.get(top, bottom, left, right) / scales.get()[top:bottom]
        return scaled.round().clamp(-_INT8_MAX, _INT8_MAX).to(dtype)

    return quantize


def _dtype(name: str) -> "torch.dtype":
    found: torch.dtype = getattr(torch, TORCH[name])
    return found


def _rounded(values: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """To the nearest; which NaN the processor makes depends on the processor, so there is only one."""
    return values.to(dtype).masked_fill_(values.isnan(), float("nan"))


class _Computed:
    """A tensor's byte grid, computed where it is asked for; with scales of rows, out of all of the weight."""

    def __init__(self, tensor: Tensor, compute: Compute, values: "_Values", scales: "_RowScales | None") -> None:
        self._itemsize = tensor.row_bytes // tensor.shape[1]
        self._compute = compute
        self._values = values
        self._by_rows = scales is not None

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""
        rows, width = out.shape
        left, right = column // self._itemsize, (column + width) // self._itemsize
        for top, bottom in _chunks(rows, right - left):
            result = self._compute(row + top, row + bottom, left, right).contiguous()
            out[top:bottom] = result.view(torch.uint8).reshape(bottom - top, width).numpy()

    def ranges(self, row: int, column: int, rows: int, width: int) -> Iterator[Range]:
        """What of the weight the block is computed from."""
        if self._by_rows:
            return self._values.ranges(0, self._values.weight.rows, 0, self._values.weight.shape[1])
        left, right = column // self._itemsize, (column + width) // self._itemsize
        return self._values.ranges(row, row + rows, left, right)


class _Values:
    """A stored linear's weight as float32: weight * scale."""

    def __init__(self, source: Source, linear: Linear) -> None:
        self.weight = linear.tensors["weight"]
        self._reader = StoredReader(source, self.weight)
        self._block = linear.block
        suffix = linear.variant.suffix(Operand.SCALE)
        # [ceil(out/b), ceil(in/k)] for blocks, [out, 1] for channels, [1, 1] for one of the whole weight
        self._scale = None if suffix is None else _load(source, linear.tensors[suffix])

    def get(self, top: int, bottom: int, left: int, right: int) -> "torch.Tensor":
        """Rows top..bottom, columns left..right, as float32."""
        itemsize = self.weight.row_bytes // self.weight.shape[1]
        out = np.empty((bottom - top, (right - left) * itemsize), np.uint8)
        self._reader.read(out, top, left * itemsize)
        weight = torch.from_numpy(out).view(_dtype(self.weight.dtype)).to(torch.float32)
        if self._scale is None:
            return weight
        if self._block is None:
            return weight * (self._scale if len(self._scale) == 1 else self._scale[top:bottom])
        rows = torch.arange(top, bottom) // self._block[0]
        columns = torch.arange(left, right) // self._block[1]
        return weight * self._scale[rows][:, columns]

    def ranges(self, top: int, bottom: int, left: int, right: int) -> Iterator[Range]:
        """Where rows top..bottom, columns left..right lie."""
        itemsize = self.weight.row_bytes // self.weight.shape[1]
        return self._reader.ranges(top, left * itemsize, bottom - top, (right - left) * itemsize)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges that together are the whole weight, each small."""
        return _chunks(*self.weight.shape)


class _RowScales:
    """One scale per output channel over the full input dimension, computed once: [out, 1] float32.

    `dtype` is what they are stored as: what is divided by is what a reader of the result will multiply with.
    """

    def __init__(self, values: _Values, dtype: str) -> None:
        self._values = values
        self._dtype = _dtype(dtype)
        self._lock = threading.Lock()
        self._scales: torch.Tensor | None = None

    def get(self) -> "torch.Tensor":
        """The scales. Raises SchemeError where a weight is no number."""
        with self._lock:
            if self._scales is None:
                self._scales = self._compute()
            return self._scales

    def _compute(self) -> "torch.Tensor":
        columns = self._values.weight.shape[1]
        chunks = [
            self._values.get(top, bottom, 0, columns).abs().amax(dim=1, keepdim=True)
            for top, bottom in self._values.chunks()
        ]
        largest = torch.cat(chunks)
        bad = (~torch.isfinite(largest)).nonzero()
        if len(bad):
            raise SchemeError(
                f"{self._values.weight.name}: row {int(bad[0, 0])} holds {float(largest[bad[0, 0], 0])}; a weight that "
                "is no number cannot be quantized"
            )
        scales = (largest / _INT8_MAX).to(self._dtype).to(torch.float32)
        return torch.where(scales == 0, 1.0, scales)  # a row of zeros, or as good as: any scale will do


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges that together are all rows, each of few elements."""
    height = max(1, _CHUNK_ELEMENTS // columns)
    for top in range(0, rows, height):
        yield top, min(top + height, rows)


def _load(source: Source, tensor: Tensor) -> "torch.Tensor":
    """A whole small matrix as float32; [n] becomes [n, 1]."""
    out = np.empty((tensor.rows, tensor.row_bytes), np.uint8)
    StoredReader(source, tensor).read(out, 0, 0)
    return torch.from_numpy(to_f32(out.view(storage(tensor.dtype)), tensor.dtype)).reshape(tensor.rows, -1)
