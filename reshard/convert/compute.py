"""The values of converted tensors, block by block. The only module that imports torch.

Shapes: [out, in] is a linear's weight; (b, k) its scale block. All arithmetic is float32, one rounding at the end,
each value on its own: the result is the same whatever the blocks in which it is asked for.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np

from reshard.checkpoint.description import Checkpoint, Linear, Tensor
from reshard.convert.rules import QUANTIZE
from reshard.errors import MissingDependencyError, SchemeError
from reshard.model.naming import ROLES
from reshard.source.base import Bytes, Range, Source
from reshard.tensors.byte_grid import BlockReader, StoredReader

try:
    import torch
except ImportError as error:
    raise MissingDependencyError(
        f"--weights computes with torch, which cannot be imported ({error}); pip install 'reshard[runtime]'"
    ) from error

_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
_INT8_MAX = 127
_CHUNK_ELEMENTS = 1 << 20


def computed_readers(source: Source, stored: Checkpoint, checkpoint: Checkpoint) -> dict[str, BlockReader]:
    """A reader for each of the checkpoint's tensors that has no bytes of its own."""
    readers: dict[str, BlockReader] = {}
    for before, after in zip(stored.layers, checkpoint.layers, strict=True):
        for role in ROLES:
            made = after.linears[role].tensors
            if made["weight"].extents:
                continue
            values = _Values(source, before.linears[role])
            scales = _RowScales(values, made["weight_scale"].dtype if "weight_scale" in made else "F32")
            for suffix, tensor in made.items():
                rule = tensor.conversion.rule if tensor.conversion else ""
                compute = _values_of(tensor, suffix, rule, values, scales)
                readers[tensor.name] = _Computed(tensor, compute, values, by_rows=rule == QUANTIZE)
    return readers


Compute = Callable[[int, int, int, int], "torch.Tensor"]
"""(first row, row behind the last, first column, column behind the last) -> values in the tensor's own type."""


def _values_of(tensor: Tensor, suffix: str, rule: str, values: "_Values", scales: "_RowScales") -> Compute:
    if suffix == "weight_offset":
        return lambda top, bottom, left, right: torch.zeros((bottom - top, right - left), dtype=_TORCH[tensor.dtype])
    if suffix == "weight_scale":
        return lambda top, bottom, left, right: scales.get()[top:bottom].to(_TORCH[tensor.dtype])
    if rule != QUANTIZE:
        return lambda *block: _rounded(values.get(*block), _TORCH[tensor.dtype])

    def quantize(top: int, bottom: int, left: int, right: int) -> "torch.Tensor":
        scaled = values.get(top, bottom, left, right) / scales.get()[top:bottom]
        return scaled.round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)

    return quantize


def _rounded(values: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """To the nearest; which NaN the processor makes depends on the processor, so there is only one."""
    return values.to(dtype).masked_fill_(values.isnan(), float("nan"))


class _Computed:
    """A tensor's byte grid, computed where it is asked for; `by_rows`: out of all of the weight's rows."""

    def __init__(self, tensor: Tensor, compute: Compute, values: "_Values", *, by_rows: bool) -> None:
        self._itemsize = tensor.row_bytes // tensor.shape[1]
        self._compute = compute
        self._values = values
        self._by_rows = by_rows

    def read(self, out: Bytes, row: int, column: int) -> None:
        """Fill `out` [rows, bytes] with the grid's bytes from (row, column)."""
        rows, width = out.shape
        left, right = column // self._itemsize, (column + width) // self._itemsize
        result = self._compute(row, row + rows, left, right).contiguous()
        out[:] = result.view(torch.uint8).reshape(rows, width).numpy()

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
        scale = linear.tensors.get("weight_scale_inv") or linear.tensors.get("weight_scale")
        # [ceil(out/b), ceil(in/k)] for blocks, [out, 1] for channels
        self._scale = None if scale is None else _load(StoredReader(source, scale), scale)

    def get(self, top: int, bottom: int, left: int, right: int) -> "torch.Tensor":
        """Rows top..bottom, columns left..right, as float32."""
        itemsize = self.weight.row_bytes // self.weight.shape[1]
        out = np.empty((bottom - top, (right - left) * itemsize), np.uint8)
        self._reader.read(out, top, left * itemsize)
        weight = torch.from_numpy(out).view(_TORCH[self.weight.dtype]).to(torch.float32)
        if self._scale is None:
            return weight
        if self._block is None:
            return weight * self._scale[top:bottom]
        rows = torch.arange(top, bottom) // self._block[0]
        columns = torch.arange(left, right) // self._block[1]
        return weight * self._scale[rows][:, columns]

    def ranges(self, top: int, bottom: int, left: int, right: int) -> Iterator[Range]:
        """Where rows top..bottom, columns left..right lie."""
        itemsize = self.weight.row_bytes // self.weight.shape[1]
        return self._reader.ranges(top, left * itemsize, bottom - top, (right - left) * itemsize)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges that together are the whole weight, each small."""
        rows, columns = self.weight.shape
        height = max(1, _CHUNK_ELEMENTS // columns)
        for top in range(0, rows, height):
            yield top, min(top + height, rows)


class _RowScales:
    """One scale per output channel over the full input dimension, computed once: [out, 1] float32.

    `dtype` is what they are stored as: what is divided by is what a reader of the result will multiply with.
    """

    def __init__(self, values: _Values, dtype: str) -> None:
        self._values = values
        self._dtype = _TORCH[dtype]
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


def _load(reader: BlockReader, tensor: Tensor) -> "torch.Tensor":
    """A whole small matrix as float32; [n] becomes [n, 1]."""
    out = np.empty((tensor.rows, tensor.row_bytes), np.uint8)
    reader.read(out, 0, 0)
    values = torch.from_numpy(out).view(_TORCH[tensor.dtype]).to(torch.float32)
    return values.reshape(tensor.rows, -1)
