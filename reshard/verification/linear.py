"""One linear in float64, as its scheme computes it, from its weight's rows as they are read.

A whole matrix in float64 is 1 GB. Shapes: [out, in] is the weight W, T tokens; x_KT is [in, T], W x [out, T].
"""

# ruff: noqa: N803 - the suffixes are shapes

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reshard.schemes.table import Arithmetic, Operand
from reshard.tensors.memory import Bytes, Memory
from reshard.verification.gate import F64
from reshard.verification.reference import BLOCK_ELEMENTS, Grid, LinearGrids, Values, scaled

_MEMORY = Memory()
_INT8_MIN, _INT8_MAX = -128, 127
_SERIAL_BLAS = 1 << 18  # multiplications; OpenBLAS: 4 * 65536


@dataclass(frozen=True)
class Sum:
    """Values and, for each, the sum of its terms' magnitudes carried through the layer: what rounding is relative to.

    A float64 sum of n terms, in whatever order, is off by at most about n * 2^-53 * sum |terms|.
    """

    value: F64
    terms: F64


class Product:
    """W x: `sum()`, once every row of the weight was added; rows that are not count as zeros.

    is_slice: whether ranks have other features of x. exact: no token is quantized. terms: whether those of `Sum` are
    wanted.
    """

    def __init__(self, linear: LinearGrids, x: Sum, is_slice: bool, *, exact: bool = False, terms: bool = True) -> None:
        self._arithmetic, self._of = linear.scheme.arithmetics[0], linear.operands
        self._step: F64 | float = 1.0
        weight = self._of[Operand.WEIGHT]
        if self._arithmetic is Arithmetic.STATIC:
            levels, self._step = _static_levels(self._of, x.value, exact)
            values, x = scaled(weight, None, None), Sum(levels, np.abs(levels) if terms else levels)
        elif self._arithmetic is Arithmetic.DYNAMIC:
            values = _levels(weight, self._of.get(Operand.OFFSET))
            # Not a slice (down's x): its scale would be its own maximum, not that of the whole, so that split and
            # unsplit would be two different roundings and no comparison of the cut.
            if not is_slice and not exact:
                levels, self._step = _dynamic_levels(x.value)
                x = Sum(levels, np.abs(levels) if terms else levels)
        else:
            # Weights alone are quantized: engines that round activations too do so to each slice on its own.
            values = scaled(weight, self._of.get(Operand.SCALE), linear.block)
        self._values, self._height = values, max(1, BLOCK_ELEMENTS // max(1, weight.columns))
        # A token's features lie together: BLAS takes 0.6 of the time for so few tokens.
        self._x_KT = np.asfortranarray(x.value)
        self._terms_KT = np.asfortranarray(x.terms) if terms else None
        value = np.zeros((weight.rows, x.value.shape[1]))
        self._sum = Sum(value, np.zeros_like(value) if terms else value)

    @np.errstate(all="ignore")  # what is no number is a finding, not a warning
    def add(self, rows: Bytes, top: int) -> None:
        """Rows of the weight from `top` on, as they are stored: all their columns, or the first ones.

        To be called once for each row, from whatever thread.
        """
        for first in range(0, len(rows), self._height):
            block = rows[first : first + self._height]
            at = slice(top + first, top + first + len(block))
            found = self._values(block, at.start)
            width = found.shape[1]
            numbers = _MEMORY.shaped(len(found), 8 * width).view(np.float64)
            numbers[:] = found
            _matmul(numbers, self._x_KT[:width], self._sum.value[at])
            if self._terms_KT is not None:
                _matmul(np.abs(numbers, out=numbers), self._terms_KT[:width], self._sum.terms[at])

    def sum(self) -> Sum:
        """[out, T]"""
        total, of = self._sum, self._of
        if self._arithmetic not in (Arithmetic.DYNAMIC, Arithmetic.STATIC):
            return total
        # The scales after the weight: where that is computed, they are known by then.
        if self._arithmetic is Arithmetic.STATIC and Operand.OUTPUT_SCALE in of:
            # It takes back what the offset adds over the full input dimension: in a row-parallel cut once for all
            # ranks.
            bias = of[Operand.BIAS].fetch(0, of[Operand.WEIGHT].rows).view(np.int32).astype(np.float64)
            total = Sum(total.value + bias, total.terms + np.abs(bias))
            scale = _deq_scale(of[Operand.OUTPUT_SCALE])
        else:
            scale = _column(of[Operand.SCALE]) * self._step
        return Sum(total.value * scale, total.terms * np.abs(scale))


def _matmul(block: F64, x: F64, out: F64) -> None:
    """Multiply [n, in] by [in, T] in products so small that the BLAS library starts no threads of its own for them.

    Its threads wait for one another in a loop, which on a busy host takes many times as long as the product.
    """
    height = max(1, _SERIAL_BLAS // x.size)
    whole = len(block) // height * height
    if whole:
        np.matmul(block[:whole].reshape(-1, height, len(x)), x, out=out[:whole].reshape(-1, height, x.shape[1]))
    if whole < len(block):
        np.matmul(block[whole:], x, out=out[whole:])


def _dynamic_levels(x_KT: F64) -> tuple[F64, F64]:
    """int8 levels, with one scale for each token."""
    largest = np.abs(x_KT).max(axis=0, keepdims=True)
    step = np.where(largest == 0, 1.0, largest / _INT8_MAX)
    return np.rint(x_KT / step), step


def _static_levels(of: Mapping[Operand, Grid], x_KT: F64, exact: bool) -> tuple[F64, float]:
    """int8 levels, with one scale and zero point for all: ModelSlim's or compressed-tensors'."""
    zero_point, step = of.get(Operand.INPUT_OFFSET), float(of[Operand.INPUT_SCALE].all_values()[0, 0])
    offset = float(zero_point.all_values()[0, 0]) if zero_point else 0.0
    levels = x_KT / step + offset
    if not exact:
        # Where gate and up are floats, split and unsplit may differ in x's last bits: that they then round to different
        # levels has a chance of about 1e-12 for each element, and is a finding.
        levels = np.clip(np.rint(levels), _INT8_MIN, _INT8_MAX)
    return levels if Operand.OUTPUT_SCALE in of else levels - offset, step


def _levels(weight: Grid, offset: Grid | None) -> Values:
    """The int8 levels less their channel's offset, as float32."""
    if offset is None:
        return scaled(weight, None, None)
    offsets = _column(offset).astype(np.float32)
    return lambda rows, top: weight.numbers(rows) - offsets[top : top + len(rows)]


def _column(grid: Grid) -> F64:
    """A value for each channel, [out] or [out, 1], as [out, 1]."""
    return grid.all_values().reshape(-1, 1).astype(np.float64)


def _deq_scale(grid: Grid) -> F64:
    """[out, 1]. As I64 it holds a float32's bits, read as int32 and widened."""
    raw = grid.fetch(0, grid.rows)
    if grid.dtype == "I64":
        raw = np.ascontiguousarray(raw.view(np.int64).astype(np.int32)).view(np.uint8)
    return raw.view(np.float32).astype(np.float64)
