"""A dense layer in float64, from the tensors as they are stored: the reference of what ranks compute.

Integers are exact there, and rounding is far below what any wrong slice, bias or scale changes.

Shapes: T tokens, H hidden_size, I intermediate_size, L a rank's share of I; x_HT, h_IT, y_HT are [features, tokens].
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from reshard.model.activation import Activation
from reshard.model.parts import DOWN, GATE, GATE_UP, UP
from reshard.schemes.table import Arithmetic, Operand
from reshard.verification.gate import F64, carried, gated
from reshard.verification.reference import BLOCK_ELEMENTS, WORKERS, Grid, LinearGrids, Values, scaled
from reshard.workers import Workers

Tick = Callable[[int], None]

_INT8_MIN, _INT8_MAX = -128, 127
_SERIAL_BLAS = 1 << 18  # multiplications; OpenBLAS: 4 * 65536


@dataclass(frozen=True)
class Sum:
    """Values and, for each, the sum of its terms' magnitudes carried through the layer: what rounding is relative to.

    A float64 sum of n terms, in whatever order, is off by at most about n * 2^-53 * sum |terms|.
    """

    value: F64
    terms: F64


@dataclass(frozen=True)
class Run:
    """`exact`: no token is quantized. `terms`: whether those of `Sum` are computed."""

    workers: Workers = field(default_factory=lambda: Workers(WORKERS))
    tick: Tick = lambda n: None
    exact: bool = False
    terms: bool = True


def unsplit_layer(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, exact: bool = False) -> F64:
    """down(act(gate x) * up x), [H, T], of unsplit linears by role; `exact`: with no token quantized."""
    return unsplit(linears, activation, x_HT, Run(exact=exact)).value


def unsplit(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, run: Run) -> Sum:
    """The same with what rounding is relative to."""
    x = Sum(x_HT, np.abs(x_HT))
    gate, up = (applied(linears[role], x, run) for role in (GATE, UP))
    h = Sum(gated(activation, gate.value, up.value), carried(activation, gate.value, up.value, gate.terms, up.terms))
    return applied(linears[DOWN], h, run, is_slice=True)


def partial_sum(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, run: Run) -> F64:
    """One rank's partial sum, [H, T]."""
    x = Sum(x_HT, np.zeros_like(x_HT))
    if GATE_UP in linears:
        gate_LT, up_LT = np.split(applied(linears[GATE_UP], x, run).value, 2)
    else:
        gate_LT, up_LT = (applied(linears[role], x, run).value for role in (GATE, UP))
    h_LT = gated(activation, gate_LT, up_LT)
    return applied(linears[DOWN], Sum(h_LT, np.zeros_like(h_LT)), run, is_slice=True).value


def applied(linear: LinearGrids, x: Sum, run: Run, is_slice: bool = False) -> Sum:
    """W x for x [in, T], as the linear's scheme computes it. is_slice: whether ranks have other features of x."""
    arithmetic, of = linear.scheme.arithmetics[0], linear.operands
    weight = of[Operand.WEIGHT]
    if arithmetic not in (Arithmetic.DYNAMIC, Arithmetic.STATIC):
        # Weights alone are quantized: engines that round activations too do so to each slice on its own.
        return _product(weight, scaled(weight, of.get(Operand.SCALE), linear.block), x, run)
    step: F64 | float
    if arithmetic is Arithmetic.STATIC:
        levels, step = _static_levels(of, x.value, run)
        total = _product(weight, weight.values, Sum(levels, np.abs(levels)), run)
    else:
        # Not a slice (down's x): its scale would be its own maximum, not that of the whole, so that split and unsplit
        # would be two different roundings and no comparison of the cut.
        levels, step = (x.value, 1.0) if is_slice or run.exact else _dynamic_levels(x.value)
        terms = x.terms if levels is x.value else np.abs(levels)
        total = _product(weight, _levels(weight, of.get(Operand.OFFSET)), Sum(levels, terms), run)
    # The scales after the weight: where that is computed, they are known by then.
    if arithmetic is Arithmetic.STATIC and Operand.OUTPUT_SCALE in of:
        # It takes back what the offset adds over the full input dimension: in a row-parallel cut once for all ranks.
        bias = of[Operand.BIAS].fetch(0, weight.rows).view(np.int32).astype(np.float64)
        total = Sum(total.value + bias, total.terms + np.abs(bias))
        scale = _deq_scale(of[Operand.OUTPUT_SCALE])
    else:
        scale = _column(of[Operand.SCALE]) * step
    return Sum(total.value * scale, total.terms * np.abs(scale))


def _dynamic_levels(x_KT: F64) -> tuple[F64, F64]:
    """int8 levels, with one scale for each token."""
    largest = np.abs(x_KT).max(axis=0, keepdims=True)
    step = np.where(largest == 0, 1.0, largest / _INT8_MAX)
    return np.rint(x_KT / step), step


def _static_levels(of: Mapping[Operand, Grid], x_KT: F64, run: Run) -> tuple[F64, float]:
    """int8 levels, with one scale and zero point for all: ModelSlim's or compressed-tensors'."""
    zero_point, step = of.get(Operand.INPUT_OFFSET), float(of[Operand.INPUT_SCALE].all_values()[0, 0])
    offset = float(zero_point.all_values()[0, 0]) if zero_point else 0.0
    levels = x_KT / step + offset
    if not run.exact:
        # Where gate and up are floats, split and unsplit may differ in x's last bits: that they then round to different
        # levels has a chance of about 1e-12 for each element, and is a finding.
        levels = np.clip(np.rint(levels), _INT8_MIN, _INT8_MAX)
    return levels if Operand.OUTPUT_SCALE in of else levels - offset, step


def _product(weight: Grid, values: Values, x: Sum, run: Run) -> Sum:
    """W x, [out, T], a few rows at a time: a whole matrix in float64 is 1 GB."""
    shape = (weight.rows, x.value.shape[1])
    value, terms = np.empty(shape), np.zeros(shape)
    # A token's features lie together: BLAS takes 0.6 of the time for so few tokens.
    x_KT, terms_KT = np.asfortranarray(x.value), np.asfortranarray(x.terms)

    def multiply(block: tuple[int, int]) -> int:
        top, bottom = block
        with np.errstate(all="ignore"):  # a thread has its own
            found = values(top, bottom).astype(np.float64)
            _matmul(found, x_KT, value[top:bottom])
            if run.terms:
                _matmul(np.abs(found, out=found), terms_KT, terms[top:bottom])
        return (bottom - top) * weight.row_bytes

    run.workers.each(multiply, weight.blocks(weight.columns, BLOCK_ELEMENTS), lambda nbytes: run.tick(nbytes // 2))
    return Sum(value, terms)


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


def _levels(weight: Grid, offset: Grid | None) -> Values:
    """The int8 levels less their channel's offset, as float32."""
    if offset is None:
        return weight.values
    offsets = _column(offset).astype(np.float32)
    return lambda top, bottom: weight.values(top, bottom) - offsets[top:bottom]


def _column(grid: Grid) -> F64:
    """A value for each channel, [out] or [out, 1], as [out, 1]."""
    return grid.all_values().reshape(-1, 1).astype(np.float64)


def _deq_scale(grid: Grid) -> F64:
    """[out, 1]. As I64 it holds a float32's bits, read as int32 and widened."""
    raw = grid.fetch(0, grid.rows)
    if grid.dtype == "I64":
        raw = np.ascontiguousarray(raw.view(np.int64).astype(np.int32)).view(np.uint8)
    return raw.view(np.float32).astype(np.float64)
