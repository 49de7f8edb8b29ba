"""The split part against the unsplit one, on random tokens.

Unsplit: y = down(act(gate x) * up x) with the source's tensors and the activation of its config.json, or what another
part's one linear makes of x. Split: every rank computes the same with what its own shard holds, and the ranks' results
are added, or stand one below the other. A byte that is right in itself and in the wrong place shows here. Shapes: see
reshard.verification.layer.
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from reshard.checkpoint.description import Checkpoint, Layer
from reshard.checks.finding import Finding
from reshard.manifest import Manifest
from reshard.model.activation import not_computed
from reshard.model.naming import CONFIG, layers_named
from reshard.model.parts import DENSE_FFN, EMBEDDING, Module
from reshard.verification.gate import F64
from reshard.verification.layer import Computation
from reshard.verification.linear import Product, Sum
from reshard.verification.lookup import Lookup
from reshard.verification.reference import LinearGrids

_TOKENS, _SEED = 4, 0
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


class Sides(Protocol):
    """A layer's computation, unsplit and split: each module is begun, and then the rows of its weights are read."""

    def begin(
        self, module: Module, whole: Sequence[LinearGrids], ranks: Sequence[LinearGrids]
    ) -> tuple[Sequence[Product | None], Sequence[Product | None]]:
        """What those rows are to be added to: of the module's unsplit linears, and of each rank's."""

    def unsplit(self) -> Sum:
        """[out, T]"""

    def split(self) -> F64:
        """The same, with rows of padding behind it, if there are any."""


class Computations:
    """Those of a checkpoint's layers, judged. checkpoint: `describe(source)`, unconverted."""

    def __init__(self, manifest: Manifest, checkpoint: Checkpoint) -> None:
        self._tp_size, self._has_config = manifest.tp_size, CONFIG in checkpoint.side_files
        # Either side's error is at most the roundings that a result goes through, one after the other (those of the two
        # sums, of the ranks' sum, a few for the activation and scales), times 2^-53 of its terms; eps is twice that.
        additions = sum(checkpoint.model.sizes.values()) + manifest.tp_size + _OTHER_ROUNDINGS
        self._bound = additions * float(np.finfo(np.float64).eps)
        self._wrong: list[Finding] = []
        self._left_out: dict[str, list[int]] = {}
        self.results: list[LayerResult] = []

    def of(self, layer: Layer) -> Sides | None:
        """None where the layer's activation is not known, which is noted."""
        activation = layer.activation
        if layer.part is DENSE_FFN and (activation is None or not activation.is_known):
            why = not_computed(activation, config=self._has_config) or ""
            self._left_out.setdefault(why, []).append(layer.number)
            return None
        rows, columns = layer.linears[layer.part.roles[0].name].tensors["weight"].shape
        if layer.part is EMBEDDING:
            return Lookup(rows, self._tp_size, _TOKENS, _SEED)
        return Computation(np.random.default_rng(_SEED).standard_normal((columns, _TOKENS)), activation)

    @np.errstate(all="ignore")  # what is no number is a finding, not a warning
    def judge(self, layer: Layer, sides: Sides) -> None:
        """To be called when every row was read."""
        unsplit = sides.unsplit()
        difference, wrong = _judge(unsplit, sides.split()[: len(unsplit.value)], self._bound)
        if math.isfinite(difference):
            self.results.append(LayerResult(layer.index, difference, self._bound))
        if wrong:
            self._wrong.append(Finding("computation", layer.module, wrong))

    def findings(self) -> list[Finding]:
        """What differs, and a warning for the layers whose activation is not known."""
        left_out = self._left_out.items()
        unknown = (
            Finding("computation", layers_named(indexes), f"not computed: {why}", "warning")
            for why, indexes in left_out
        )
        return [*self._wrong, *unknown]


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
