"""The split layer against the unsplit one, on random tokens.

Unsplit: y = down(act(gate x) * up x) with the source's tensors and the activation of its config.json. Split: every rank
computes the same with what its own shard holds, and the ranks' results are added. Both in float64, where integers are
exact and rounding is far below what any wrong slice, bias or scale changes; a byte that is right in itself and in the
wrong place shows here.

Shapes: T tokens, H hidden_size, I intermediate_size, L the rank's share of I; x_HT, h_IT, y_HT are [features, tokens].
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from reshard.checkpoint.description import Checkpoint, Extent, Layer, Tensor
from reshard.checks.finding import Finding
from reshard.errors import MismatchError
from reshard.manifest import Manifest
from reshard.model.activation import Activation, not_computed
from reshard.model.naming import CONFIG, layers_named
from reshard.model.parts import DOWN, GATE, GATE_UP, UP
from reshard.schemes.table import Arithmetic, Operand
from reshard.source.base import Source
from reshard.tensors.header import Header, TensorInfo
from reshard.verification.expect import expect, misfits, read_headers
from reshard.verification.gate import F64, carried, gated
from reshard.verification.reference import (
    BLOCK_ELEMENTS,
    WORKERS,
    Grid,
    LinearGrids,
    Reference,
    Values,
    scaled,
    stored_grid,
)

Tick = Callable[[int], None]

_INT8_MIN, _INT8_MAX = -128, 127
_OTHER_ROUNDINGS = 16
_SERIAL_BLAS = 1 << 18  # multiplications; OpenBLAS: 4 * 65536


@dataclass(frozen=True)
class LayerResult:
    """A layer, computed split and unsplit: the largest difference of an output, and what it may be.

    Both are relative to the magnitude of the terms that are added up to that output (see `_Sum`).
    """

    layer: int
    difference: float
    bound: float


@dataclass(frozen=True)
class _Sum:
    """Values and, for each, the sum of its terms' magnitudes carried through the layer: what rounding is relative to.

    A float64 sum of n terms, in whatever order, is off by at most about n * 2^-53 * sum |terms|.
    """

    value: F64
    terms: F64


@dataclass(frozen=True)
class _Run:
    """`exact`: no token is quantized. `terms`: whether those of `_Sum` are computed."""

    tick: Tick = lambda n: None
    exact: bool = False
    terms: bool = True


@np.errstate(all="ignore")  # what is no number is a finding, not a warning
def compare_computation(
    shards: Source,
    manifest: Manifest,
    source: Source,
    checkpoint: Checkpoint,
    tokens: int = 4,
    seed: int = 0,
    tick: Tick = lambda n: None,
) -> tuple[list[Finding], list[LayerResult]]:
    """Findings, and a result for each layer that is computed; a warning for those whose activation is not known.

    checkpoint: `describe(source)`, unconverted. `tick` is called with half the bytes of each step in source and shards:
    all the shards' bytes in the end, about.
    """
    findings: list[Finding] = []
    results: list[LayerResult] = []
    has_config = CONFIG in checkpoint.side_files
    left_out: dict[str, list[int]] = {}
    x_HT = np.random.default_rng(seed).standard_normal((checkpoint.model.hidden_size, tokens))
    reference = Reference(source, manifest)
    headers, unreadable = read_headers(shards, manifest)
    if unreadable:
        return unreadable, []
    for layer in checkpoint.layers:
        module, activation = layer.module, layer.activation
        if activation is None or not activation.is_known:
            left_out.setdefault(not_computed(activation, config=has_config) or "", []).append(layer.index)
            continue
        try:
            whole = {r: reference.linear(layer.linears[r], _module(layer, r, manifest)) for r in (GATE, UP, DOWN)}
            ranks = _rank_linears(shards, manifest, headers, layer, whole)
        except MismatchError as error:
            findings.append(Finding("computation", module, f"not computed: {error}"))
            continue
        unsplit = _unsplit(whole, activation, x_HT, _Run(tick))
        split_HT = np.zeros_like(unsplit.value)
        for tp_rank in headers:
            split_HT += _rank_output(ranks[tp_rank], activation, x_HT, _Run(tick, terms=False))
        # Either side's error is at most the roundings that a result goes through, one after the other (those of the two
        # sums, of the ranks' sum, a few for the activation and scales), times 2^-53 of its terms; eps is twice that.
        additions = len(x_HT) + whole[GATE].tensors["weight"].rows + manifest.tp_size + _OTHER_ROUNDINGS
        bound = additions * float(np.finfo(np.float64).eps)
        difference, wrong = _judge(unsplit, split_HT, bound)
        if math.isfinite(difference):
            results.append(LayerResult(layer.index, difference, bound))
        if wrong:
            findings.append(Finding("computation", module, wrong))
    for why, indexes in left_out.items():
        findings.append(Finding("computation", layers_named(indexes), f"not computed: {why}", "warning"))
    return findings, results


def _judge(unsplit: _Sum, split_HT: F64, bound: float) -> tuple[float, str | None]:
    """The largest relative difference, and what is wrong with it."""
    if not np.isfinite(unsplit.terms).all():
        return math.inf, "not computed: the source's own values overflow, or one of them is no number"
    difference_HT = np.abs(split_HT - unsplit.value)
    relative_HT = np.where(difference_HT == 0, 0.0, difference_HT / unsplit.terms)
    relative_HT[np.isnan(relative_HT)] = math.inf
    row, token = divmod(int(np.argmax(relative_HT)), relative_HT.shape[1])
    largest = float(relative_HT[row, token])
    if largest <= bound:
        return largest, None
    return largest, (
        f"output {row} of token {token} is {split_HT[row, token]:.17g} split and {unsplit.value[row, token]:.17g} "
        f"unsplit: {largest:.3g} of its terms' magnitude, at most {bound:.3g} is rounding"
    )


def _module(layer: Layer, role: str, manifest: Manifest) -> str:
    stack = layer.part.stack(role) if manifest.layout == "fused" else None
    return f"{layer.module}.{stack or role}"


def _rank_linears(
    shards: Source,
    manifest: Manifest,
    headers: Mapping[int, Header],
    layer: Layer,
    whole: Mapping[str, LinearGrids],
) -> list[dict[str, LinearGrids]]:
    """Each rank's own linears by shard module. Raises MismatchError where a tensor is missing or of another shape."""
    ranks: list[dict[str, LinearGrids]] = [{} for _ in headers]
    for module in layer.part.laid_out(manifest.layout):
        name, linears = f"{layer.module}.{module.name}", [whole[role.name] for role in module.roles]
        expected = {rank: expect(module, name, linears, manifest, rank) for rank in headers}
        for unfit in misfits(manifest, headers, expected):
            raise MismatchError(f"{unfit.where}: {unfit.message}")
        for rank, tensors in expected.items():
            file = manifest.shards[rank].file
            infos = [(tensor.name, headers[rank].tensors[tensor.name]) for tensor in tensors]
            grids = {name.rpartition(".")[2]: _shard_grid(shards, file, name, info) for name, info in infos}
            ranks[rank][module.name] = LinearGrids(linears[0].variant, linears[0].block, grids)
    return ranks


def _shard_grid(shards: Source, file: str, name: str, info: TensorInfo) -> Grid:
    bare = Tensor(name, info.dtype, info.shape, ())
    extent = Extent(file, info.start, bare.row_bytes, 0, 0, bare.rows, bare.row_bytes)
    return stored_grid(shards, replace(bare, extents=(extent,)))


def unsplit_layer(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, exact: bool = False) -> F64:
    """down(act(gate x) * up x), [H, T], of unsplit linears by role; `exact`: with no token quantized."""
    return _unsplit(linears, activation, x_HT, _Run(exact=exact)).value


def _unsplit(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, run: _Run) -> _Sum:
    x = _Sum(x_HT, np.abs(x_HT))
    gate, up = (_apply(linears[role], x, run) for role in (GATE, UP))
    h = _Sum(gated(activation, gate.value, up.value), carried(activation, gate.value, up.value, gate.terms, up.terms))
    return _apply(linears[DOWN], h, run, is_down=True)


def _rank_output(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, run: _Run) -> F64:
    """One rank's partial sum, [H, T]."""
    x = _Sum(x_HT, np.zeros_like(x_HT))
    if GATE_UP in linears:
        gate_LT, up_LT = np.split(_apply(linears[GATE_UP], x, run).value, 2)
    else:
        gate_LT, up_LT = (_apply(linears[role], x, run).value for role in (GATE, UP))
    h_LT = gated(activation, gate_LT, up_LT)
    return _apply(linears[DOWN], _Sum(h_LT, np.zeros_like(h_LT)), run, is_down=True).value


def _apply(linear: LinearGrids, x: _Sum, run: _Run, is_down: bool = False) -> _Sum:
    """W x for x [in, T], as the linear's scheme computes it."""
    arithmetic, of = linear.scheme.arithmetics[0], linear.operands
    weight = of[Operand.WEIGHT]
    if arithmetic not in (Arithmetic.DYNAMIC, Arithmetic.STATIC):
        # Weights alone are quantized: engines that round activations too do so to each slice on its own.
        return _product(weight, scaled(weight, of.get(Operand.SCALE), linear.block), x, run)
    step: F64 | float
    if arithmetic is Arithmetic.STATIC:
        levels, step = _static_levels(of, x.value, run)
        total = _product(weight, weight.values, _Sum(levels, np.abs(levels)), run)
    else:
        # Not down's x: the scale of a slice is the slice's own maximum, not that of the whole, so that split and
        # unsplit would be two different roundings and no comparison of the cut.
        levels, step = (x.value, 1.0) if is_down or run.exact else _dynamic_levels(x.value)
        terms = x.terms if levels is x.value else np.abs(levels)
        total = _product(weight, _levels(weight, of.get(Operand.OFFSET)), _Sum(levels, terms), run)
    # The scales after the weight: where that is computed, they are known by then.
    if arithmetic is Arithmetic.STATIC and Operand.OUTPUT_SCALE in of:
        # It takes back what the offset adds over the full input dimension: in a row-parallel cut once for all ranks.
        bias = of[Operand.BIAS].fetch(0, weight.rows).view(np.int32).astype(np.float64)
        total = _Sum(total.value + bias, total.terms + np.abs(bias))
        scale = _deq_scale(of[Operand.OUTPUT_SCALE])
    else:
        scale = _column(of[Operand.SCALE]) * step
    return _Sum(total.value * scale, total.terms * np.abs(scale))


def _dynamic_levels(x_KT: F64) -> tuple[F64, F64]:
    """int8 levels, with one scale for each token."""
    largest = np.abs(x_KT).max(axis=0, keepdims=True)
    step = np.where(largest == 0, 1.0, largest / _INT8_MAX)
    return np.rint(x_KT / step), step


def _static_levels(of: Mapping[Operand, Grid], x_KT: F64, run: _Run) -> tuple[F64, float]:
    """int8 levels, with one scale and zero point for all: ModelSlim's or compressed-tensors'."""
    zero_point, step = of.get(Operand.INPUT_OFFSET), float(of[Operand.INPUT_SCALE].all_values()[0, 0])
    offset = float(zero_point.all_values()[0, 0]) if zero_point else 0.0
    levels = x_KT / step + offset
    if not run.exact:
        # Where gate and up are floats, split and unsplit may differ in x's last bits: that they then round to different
        # levels has a chance of about 1e-12 for each element, and is a finding.
        levels = np.clip(np.rint(levels), _INT8_MIN, _INT8_MAX)
    return levels if Operand.OUTPUT_SCALE in of else levels - offset, step


def _product(weight: Grid, values: Values, x: _Sum, run: _Run) -> _Sum:
    """W x, [out, T], a few rows at a time: a whole matrix in float64 is 1 GB."""
    shape = (weight.rows, x.value.shape[1])
    value, terms = np.empty(shape), np.zeros(shape)

    def multiply(top: int, bottom: int) -> int:
        with np.errstate(all="ignore"):  # a thread has its own
            block = values(top, bottom).astype(np.float64)
            _matmul(block, x.value, value[top:bottom])
            if run.terms:
                _matmul(np.abs(block, out=block), x.terms, terms[top:bottom])
        return (bottom - top) * weight.row_bytes

    with ThreadPoolExecutor(WORKERS) as pool:
        for nbytes in pool.map(multiply, *zip(*weight.blocks(weight.columns, BLOCK_ELEMENTS), strict=True)):
            run.tick(nbytes // 2)
    return _Sum(value, terms)


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
