"""A layer in float64, from the tensors as they are stored: unsplit, the reference of what ranks compute, and split.

Integers are exact there, and rounding is far below what any wrong slice, bias or scale changes.

Shapes: T tokens, H hidden_size, I intermediate_size, L a rank's share of I; x_HT, h_IT, y_HT are [features, tokens].
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from reshard.model.activation import Activation
from reshard.model.parts import DENSE_FFN, DOWN, Module, Parallel
from reshard.verification.gate import F64, carried, gated
from reshard.verification.linear import Product, Sum
from reshard.verification.reference import WORKERS, Grid, LinearGrids
from reshard.workers import Workers


def unsplit_layer(linears: Mapping[str, LinearGrids], activation: Activation, x_HT: F64, exact: bool = False) -> F64:
    """down(act(gate x) * up x), [H, T], of unsplit linears by role; `exact`: with no token quantized."""
    computation = Computation(x_HT, activation, exact)
    for module in DENSE_FFN.laid_out("separate"):
        linear = linears[module.name]
        (product,), _ = computation.begin(module, [linear], [])
        _read_all(linear.tensors["weight"], product)
    return computation.unsplit().value


def _read_all(weight: Grid, product: Product) -> None:
    def step(block: tuple[int, int]) -> None:
        product.add(weight.fetch(*block), block[0])

    Workers(WORKERS).each(step, weight.blocks(), lambda _: None)


class Computation:
    """A dense layer, or a part that is one linear: unsplit, and split as its ranks compute it.

    Each module, in their order, is begun, and then given the rows of its weights.
    """

    def __init__(self, x_KT: F64, activation: Activation | None = None, exact: bool = False) -> None:
        x_KT = np.asfortranarray(x_KT)  # once, and not for each product
        self._x, self._activation, self._exact = Sum(x_KT, np.abs(x_KT)), activation, exact
        self._begun: list[tuple[Module, list[Product], list[Product]]] = []

    @np.errstate(all="ignore")  # what is no number is a finding, not a warning
    def begin(
        self, module: Module, whole: Sequence[LinearGrids], ranks: Sequence[LinearGrids]
    ) -> tuple[list[Product], list[Product]]:
        """What the weights' rows are to be added to: of the module's unsplit linears, and of each rank's."""
        x, of_ranks = self._inputs(module, len(ranks))
        is_slice = module.parallel is Parallel.ROW
        unsplit = [Product(linear, x, is_slice, exact=self._exact) for linear in whole]
        split = [
            Product(linear, Sum(x_KT, x_KT), is_slice, terms=False)
            for linear, x_KT in zip(ranks, of_ranks, strict=True)
        ]
        self._begun.append((module, unsplit, split))
        return unsplit, split

    def _inputs(self, module: Module, tp_size: int) -> tuple[Sum, Sequence[F64]]:
        if module.name != DOWN:
            x_KT = self._x.value
            return self._x, [x_KT] * tp_size if module.parallel is Parallel.COLUMN else np.split(x_KT, tp_size)
        before, self._begun = self._begun, []
        gate, up = (linear.sum() for _, unsplit, _ in before for linear in unsplit)
        activation = cast("Activation", self._activation)  # known, or nothing is computed
        h_IT = gated(activation, gate.value, up.value)
        of_ranks = []
        for rank in range(tp_size):
            stacks = [(stack, split[rank].sum().value) for stack, _, split in before]
            gate_LT, up_LT = (each for stack, y in stacks for each in np.split(y, len(stack.roles)))
            of_ranks.append(gated(activation, gate_LT, up_LT))
        return Sum(h_IT, carried(activation, gate.value, up.value, gate.terms, up.terms)), of_ranks

    def unsplit(self) -> Sum:
        """[out, T] of the last module."""
        ((_, (linear,), _),) = self._begun
        return linear.sum()

    def split(self) -> F64:
        """The same from the ranks' slices: added, or in rank order one below the other, rows of padding the last."""
        ((module, _, split),) = self._begun
        results = [linear.sum().value for linear in split]
        return np.concatenate(results) if module.parallel is Parallel.COLUMN else added(results)


def added(results: Sequence[F64]) -> F64:
    """The ranks' results, added in their order."""
    total = np.zeros_like(results[0])
    for result in results:
        total += result
    return total
