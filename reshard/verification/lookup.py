"""The embedding, unsplit and split: vectors are looked up, nothing is multiplied.

Shapes: [V, H] is the table, V its vocabulary, H hidden_size; numbers_N are the N tokens that are looked up.
"""

# ruff: noqa: N806 - the suffixes are shapes

from collections.abc import Sequence

import numpy as np

from reshard.model.parts import Module
from reshard.verification.gate import F64
from reshard.verification.layer import added
from reshard.verification.linear import Sum
from reshard.verification.reference import LinearGrids


class Lookup:
    """In place of a `Computation`. Looked up are each rank's first and last token, and `tokens` random ones."""

    def __init__(self, vocabulary: int, tp_size: int, tokens: int, seed: int) -> None:
        edges = np.linspace(0, vocabulary, tp_size + 1).astype(int)
        random = np.random.default_rng(seed).integers(0, vocabulary, tokens)
        self._numbers_N = np.clip(np.concatenate([edges[:-1], edges[1:] - 1, random]), 0, vocabulary - 1)

    def begin(
        self, module: Module, whole: Sequence[LinearGrids], ranks: Sequence[LinearGrids]
    ) -> tuple[list[None], list[None]]:
        """The weights' rows are not wanted as they are read."""
        (self._whole,), self._ranks = whole, ranks
        return [None], [None] * len(ranks)

    def unsplit(self) -> Sum:
        """[H, N]"""
        rows_HN = self._looked_up(self._whole, 0)
        return Sum(rows_HN, np.abs(rows_HN))

    def split(self) -> F64:
        """[H, N], the ranks' vectors added, which are zeros for others' tokens."""
        share = self._ranks[0].tensors["weight"].rows
        return added([self._looked_up(rank, place * share) for place, rank in enumerate(self._ranks)])

    def _looked_up(self, weight: LinearGrids, first: int) -> F64:
        """Rows of a slice of the table that begins with row `first`."""
        grid = weight.tensors["weight"]
        found_HN = np.zeros((grid.columns, len(self._numbers_N)))
        for token, number in enumerate(self._numbers_N - first):
            if 0 <= number < grid.rows:
                found_HN[:, token] = grid.numbers(grid.fetch(number, number + 1))[0]
        return found_HN
