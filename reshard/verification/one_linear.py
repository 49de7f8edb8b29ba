"""A part that is one linear (o_proj, LM head, embedding) in float64, split and unsplit.

Shapes: [out, in] is its weight; x_KT [in, T], y_MT [out, T]; V a vocabulary, H hidden_size.
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

from collections.abc import Sequence

import numpy as np

from reshard.model.parts import EMBEDDING, Parallel, Part
from reshard.verification.gate import F64
from reshard.verification.layer import Run, Sum, applied
from reshard.verification.reference import LinearGrids


def random_input(part: Part, weight: LinearGrids, tp_size: int, tokens: int, seed: int) -> F64:
    """x_KT, random; for the embedding the numbers of tokens, [T]: each rank's first and last, and random ones."""
    rng, grid = np.random.default_rng(seed), weight.tensors["weight"]
    if part is not EMBEDDING:
        x_KT: F64 = rng.standard_normal((grid.columns, tokens))
        return x_KT
    edges = np.linspace(0, grid.rows, tp_size + 1).astype(int)
    numbers = np.concatenate([edges[:-1], edges[1:] - 1, rng.integers(0, grid.rows, tokens)])
    numbers_T: F64 = np.clip(numbers, 0, grid.rows - 1).astype(np.float64)
    return numbers_T


def unsplit_linear(part: Part, weight: LinearGrids, x_KT: F64, run: Run) -> Sum:
    """W x, [out, T]; for the embedding the tokens' vectors, [H, T]."""
    if part is EMBEDDING:
        rows_HT = _looked_up(weight, x_KT, 0)
        return Sum(rows_HT, np.abs(rows_HT))
    return applied(weight, Sum(x_KT, np.abs(x_KT)), run, is_slice=part.modules[0].parallel is Parallel.ROW)


def split_linear(part: Part, ranks: Sequence[LinearGrids], x_KT: F64, run: Run) -> F64:
    """The same from the ranks' slices, in rank order: rows one below the other, sums of columns or of looked-up rows.

    Of rows that were added behind a vocabulary the results are there, too: zeros.
    """
    if part is EMBEDDING:
        share = ranks[0].tensors["weight"].rows
        return _added([_looked_up(rank, x_KT, place * share) for place, rank in enumerate(ranks)])
    if part.modules[0].parallel is Parallel.COLUMN:
        x = Sum(x_KT, np.zeros_like(x_KT))
        return np.concatenate([applied(rank, x, run).value for rank in ranks])
    parts_LT = np.split(x_KT, len(ranks))
    slices = zip(ranks, parts_LT, strict=True)
    return _added([applied(rank, Sum(x, np.zeros_like(x)), run, is_slice=True).value for rank, x in slices])


def _added(values: Sequence[F64]) -> F64:
    total = np.zeros_like(values[0])
    for value in values:
        total += value
    return total


def _looked_up(weight: LinearGrids, numbers_T: F64, first: int) -> F64:
    """[H, T]: rows of a slice of the table that begins with row `first`; zeros for tokens of other ranks."""
    grid = weight.tensors["weight"]
    found_HT = np.zeros((grid.columns, len(numbers_T)))
    for token, number in enumerate(numbers_T.astype(int) - first):
        if 0 <= number < grid.rows:
            found_HT[:, token] = grid.values(number, number + 1)[0]
    return found_HT
