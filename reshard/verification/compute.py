"""The split part against the unsplit one, on random tokens.

Unsplit: y = down(act(gate x) * up x) with the source's tensors and the activation of its config.json, or what another
part's one linear makes of x. Split: every rank computes the same with what its own shard holds, and the ranks' results
are added, or stand one below the other. A byte that is right in itself and in the wrong place shows here. Shapes: see
reshard.verification.layer.
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from reshard.checkpoint.description import Checkpoint, Extent, Layer, Tensor
from reshard.checks.finding import Finding
from reshard.errors import MismatchError
from reshard.manifest import Manifest
from reshard.model.activation import not_computed
from reshard.model.naming import CONFIG, layers_named
from reshard.model.parts import DENSE_FFN
from reshard.source.base import Source
from reshard.tensors.header import Header, TensorInfo
from reshard.verification.expect import expect, misfits, read_headers
from reshard.verification.gate import F64
from reshard.verification.layer import Run, Sum, Tick, partial_sum, unsplit
from reshard.verification.one_linear import random_input, split_linear, unsplit_linear
from reshard.verification.reference import WORKERS, Grid, LinearGrids, Reference, stored_grid
from reshard.workers import Workers

_OTHER_ROUNDINGS = 16


@dataclass(frozen=True)
class LayerResult:
    """A layer, computed split and unsplit: the largest difference of an output, and what it may be.

    Both are relative to the magnitude of the terms that are added up to that output (see `Sum`). layer: None of a part
    that the model has once.
    """

    layer: int | None
    difference: float
    bound: float


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
    reference, workers = Reference(source, manifest), Workers(WORKERS, shards, source)
    headers, unreadable = read_headers(shards, manifest)
    if unreadable:
        return unreadable, []
    for layer in checkpoint.layers:
        activation = layer.activation
        if layer.part is DENSE_FFN and (activation is None or not activation.is_known):
            left_out.setdefault(not_computed(activation, config=has_config) or "", []).append(layer.number)
            continue
        try:
            whole = {r: reference.linear(linear, _module(layer, r, manifest)) for r, linear in layer.linears.items()}
            ranks = _rank_linears(shards, manifest, headers, layer, whole)
        except MismatchError as error:
            findings.append(Finding("computation", layer.module, f"not computed: {error}"))
            continue
        runs = Run(workers, tick), Run(workers, tick, terms=False)
        if activation is not None:
            sums = unsplit(whole, activation, x_HT, runs[0])
            split_HT = np.zeros_like(sums.value)
            for tp_rank in headers:
                split_HT += partial_sum(ranks[tp_rank], activation, x_HT, runs[1])
        else:
            (role,) = whole.values()
            x = random_input(layer.part, role, manifest.tp_size, tokens, seed)
            sums = unsplit_linear(layer.part, role, x, runs[0])
            slices = [linear for tp_rank in headers for linear in ranks[tp_rank].values()]
            split_HT = split_linear(layer.part, slices, x, runs[1])[: len(sums.value)]
        # Either side's error is at most the roundings that a result goes through, one after the other (those of the two
        # sums, of the ranks' sum, a few for the activation and scales), times 2^-53 of its terms; eps is twice that.
        additions = sum(checkpoint.model.sizes.values()) + manifest.tp_size + _OTHER_ROUNDINGS
        bound = additions * float(np.finfo(np.float64).eps)
        difference, wrong = _judge(sums, split_HT, bound)
        if math.isfinite(difference):
            results.append(LayerResult(layer.index, difference, bound))
        if wrong:
            findings.append(Finding("computation", layer.module, wrong))
    for why, indexes in left_out.items():
        findings.append(Finding("computation", layers_named(indexes), f"not computed: {why}", "warning"))
    return findings, results


def _judge(unsplit_HT: Sum, split_HT: F64, bound: float) -> tuple[float, str | None]:
    """The largest relative difference, and what is wrong with it."""
    if not np.isfinite(unsplit_HT.terms).all():
        return math.inf, "not computed: the source's own values overflow, or one of them is no number"
    difference_HT = np.abs(split_HT - unsplit_HT.value)
    relative_HT = np.where(difference_HT == 0, 0.0, difference_HT / unsplit_HT.terms)
    relative_HT[np.isnan(relative_HT)] = math.inf
    row, token = divmod(int(np.argmax(relative_HT)), relative_HT.shape[1])
    largest = float(relative_HT[row, token])
    if largest <= bound:
        return largest, None
    return largest, (
        f"output {row} of token {token} is {split_HT[row, token]:.17g} split and {unsplit_HT.value[row, token]:.17g} "
        f"unsplit: {largest:.3g} of its terms' magnitude, at most {bound:.3g} is rounding"
    )


def _module(layer: Layer, role: str, manifest: Manifest) -> str:
    stack = layer.part.stack(role) if manifest.layout == "fused" else None
    return layer.name(stack or role)


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
        name, linears = layer.name(module.name), [whole[role.name] for role in module.roles]
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
