"""A cut on an Ascend NPU: tiles and limits by arithmetic, the forward pass by torch_npu where it is installed.

L the rank's share of intermediate_size, H hidden_size; a rank's weights are [2L, H] and [H, L].
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.model.activation import not_computed
from reshard.model.parts import Module, Parallel
from reshard.plan.plan import Plan, PlannedTensor
from reshard.schemes.table import SCHEMES, VLLM_ASCEND, scheme_named
from reshard.tensors.tiles import LAST_DIM_LIMIT, TILES, limit_faults, tile_faults

_NPU = "npu"
_TOKENS = (1, 24, 4096)


@dataclass(frozen=True)
class Matrix:
    """One rank's part of a module of a layer, and the type that its weight has on the device."""

    name: str
    module: Module
    scheme: str
    tensors: Mapping[str, PlannedTensor]

    @property
    def sizes(self) -> tuple[int, int]:
        """L and H."""
        rows, columns = self.weight.shape
        return (rows // len(self.module.roles), columns) if self.module.parallel is Parallel.COLUMN else (columns, rows)

    @property
    def weight(self) -> PlannedTensor:
        """[n·L, H] of n linears, or [H, L]."""
        return self.tensors["weight"]

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.weight.dtype if _NPU in scheme_named(self.scheme, self.name).native else "BF16"


_Layers = list[tuple[Matrix, ...]]


def check_npu(checkpoint: Checkpoint, plan: Plan) -> list[Finding]:
    """Findings for rank 0 of a fused plan; every rank's shapes are the same."""
    layers = [
        tuple(
            _matrix(plan, layer.name(module.name), module, linears[0].variant.scheme)
            for module, linears in layer.modules("fused")
        )
        for layer in checkpoint.layers
    ]
    where = f"tp {plan.tp_size}"
    return [*_tiles(layers, where), *_limits(layers, where), _forward(checkpoint, plan, layers, where)]


def _matrix(plan: Plan, name: str, module: Module, scheme: str) -> Matrix:
    start = f"{name}."
    tensors = {t.name.removeprefix(start): t for t in plan.shards[0].tensors if t.name.startswith(start)}
    return Matrix(name, module, scheme, tensors)


def _distinct(layers: _Layers) -> list[Matrix]:
    """A matrix of every shape and type."""
    matrices = [matrix for layer in layers for matrix in layer]
    return list({(matrix.weight.shape, matrix.dtype): matrix for matrix in reversed(matrices)}.values())[::-1]


def check_kernels(checkpoint: Checkpoint) -> Finding:
    """Whether the device multiplies the weights as they are stored."""
    schemes = sorted({linear.variant.scheme for layer in checkpoint.layers for linear in layer.linears.values()})
    lacking = [scheme for scheme in schemes if _NPU not in SCHEMES[scheme].native]
    if not lacking:
        return Finding("kernels", "", f"{', '.join(schemes)} as stored", "ok")
    served = all(VLLM_ASCEND in SCHEMES[scheme].native for scheme in lacking)
    engine = f"{VLLM_ASCEND} {'serves it' if served else 'does not serve it'}"
    options = " or ".join(f"--weights {SCHEMES[name].option}" for name in reversed(SCHEMES[lacking[0]].becomes))
    line = f"no NPU kernel multiplies {', '.join(lacking)}: the runtime makes it BF16 at load, {engine}"
    return Finding("kernels", "", f"{line}; cut with {options}", "warning")


def _tiles(layers: _Layers, where: str) -> Iterator[Finding]:
    """A matrix that is no whole tiles is padded on the device: right, and slower and larger than it looks."""
    wrong: list[str] = []
    right: dict[str, list[str]] = {}
    for matrix in _distinct(layers):
        if matrix.dtype not in TILES:
            continue
        number, tile = TILES[matrix.dtype]
        shown = _shown(matrix.weight.shape)
        right.setdefault(f"{number} tiles of {tile[0]} x {tile[1]}", []).append(shown)
        faults = tile_faults(matrix.module, *matrix.sizes, tile, number)
        wrong += [f"{matrix.name}.weight {shown}: {fault}" for fault in faults]
    for line in wrong:
        yield Finding("tiles", where, line, "warning")
    if not wrong:
        line = "; ".join(f"{name}: {', '.join(shapes)}" for name, shapes in right.items())
        yield Finding("tiles", where, line or "no tiles for float32", "ok")


def _limits(layers: _Layers, where: str) -> Iterator[Finding]:
    quantized = [matrix for matrix in _distinct(layers) if matrix.dtype == "I8"]
    wrong = [
        f"{matrix.name}.weight {_shown(matrix.weight.shape)}: {fault}"
        for matrix in quantized
        for fault in limit_faults(matrix.module, *matrix.sizes, LAST_DIM_LIMIT)
    ]
    for line in wrong:
        yield Finding("limits", where, line)
    if not wrong:
        widest = max((size for matrix in quantized for size in matrix.weight.shape), default=0)
        line = f"the widest matrix is {widest}, npu_quant_matmul takes up to {LAST_DIM_LIMIT}"
        yield Finding("limits", where, line if quantized else "no int8 matrix, so no npu_quant_matmul", "ok")


def _forward(checkpoint: Checkpoint, plan: Plan, layers: _Layers, where: str) -> Finding:
    """Every call of the forward pass on the meta device, by the runtime's own classes."""

    def skipped(why: str) -> Finding:
        return Finding("forward", where, f"not checked: {why}", "skipped")

    if importlib.util.find_spec("torch_npu") is None:
        return skipped("torch_npu is not installed here; check where it is: pip install torch_npu")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch_npu greets on stdout, which is ours
            from reshard_runtime.kernels import device_of, kernels_for
            from reshard_runtime.shape_check import Linear, forward_on_meta

            kernels = kernels_for(device_of("npu"))
    except Exception as error:  # whatever a torch_npu raises that lacks CANN, or is of another torch
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        return skipped(f"torch_npu is installed and cannot be imported: {reason}")
    checked = 0
    seen = set()
    for layer, matrices in zip(checkpoint.layers, layers, strict=True):
        activation = layer.activation
        if activation is None or not activation.is_known:
            return skipped(f"layer {layer.number}: {not_computed(activation)}")
        linears = [
            Linear(matrix.name, matrix.scheme, {s: (t.dtype, t.shape) for s, t in matrix.tensors.items()})
            for matrix in matrices
        ]
        key = activation, *((linear.scheme, tuple(sorted(linear.tensors.items()))) for linear in linears)
        if key in seen:
            continue
        seen.add(key)
        sizes = checkpoint.model.hidden_size, checkpoint.shared_size
        refused = forward_on_meta(linears, plan.tp_size, sizes, kernels, _TOKENS, activation)
        if refused is not None:
            return Finding("forward", where, f"{layer.module}: {refused}")
        checked += 1
    tokens = ", ".join(map(str, _TOKENS))
    kinds = "all layers alike" if checked == 1 else f"{checked} kinds of layers"
    return Finding("forward", where, f"torch_npu accepts every call for {tokens} tokens a rank, {kinds}", "ok")


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape))
