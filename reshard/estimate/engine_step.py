"""One decode step through a part that stays the engine's own layer, as vllm-ascend splits it over a group of its own.

By ops/linear_op.py (OProjRowParallelOp) and ops/vocab_parallel_embedding.py of vllm-ascend 0.18 and 0.23; unsplit, as
without the option. T tokens that a rank brings, N rows that it sends, R tp_size, H hidden_size, L the rank's share of
the vocabulary or of attention's values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reshard.estimate.step import BF16, INT32, Collective, Kernel, multiply, vector
from reshard.model.parts import EMBEDDING, LM_HEAD, O_PROJ, Part
from reshard.schemes.table import Arithmetic


@dataclass(frozen=True)
class EngineSplit:
    """A part on one rank. max_tokens: N, where it is fixed."""

    part: Part
    tp_size: int
    tokens: int
    hidden_size: int
    share: int
    way: Arithmetic
    max_tokens: int | None = None

    @property
    def sent(self) -> int:
        """Rows that a rank sends, or keeps."""
        return self.tokens if self.max_tokens is None or self.tp_size == 1 else self.max_tokens

    @property
    def rows(self) -> int:
        """Rows that a rank computes."""
        return self.tp_size * self.sent


_Steps = Iterator[Kernel | Collective]


def engine_steps(split: EngineSplit) -> _Steps:
    """What the rank does, one after another."""
    return _STEPS[split.part](split)


def _o_proj(split: EngineSplit) -> _Steps:
    """A rank gets its own heads of all tokens; every token's sums go back to its rank."""
    own, hidden, share = split.sent, split.hidden_size, split.share
    if split.tp_size > 1:
        yield vector(2 * own * split.tp_size * share * BF16)  # [N, R, L] to [R, N, L]
        yield Collective("exchange", split.tp_size, own * share * BF16, split.tp_size)
    yield from _linear(split, share, hidden)
    if split.tp_size > 1:
        yield Collective("scatter", split.tp_size, own * hidden * BF16, split.tp_size)


def _lm_head(split: EngineSplit) -> _Steps:
    """A rank has its own rows of the vocabulary for all tokens; every token's logits go back to its rank."""
    own, hidden, share = split.sent, split.hidden_size, split.share
    if split.tp_size > 1:
        yield Collective("gather", split.tp_size, own * hidden * BF16, split.tp_size)
    yield from _linear(split, hidden, share)
    if split.tp_size > 1:
        yield Collective("exchange", split.tp_size, own * share * BF16, split.tp_size)
        yield vector(2 * own * split.tp_size * share * BF16)  # [R, N, L] to [N, R, L]


def _embedding(split: EngineSplit) -> _Steps:
    """A rank looks all tokens up, has zeros for those of others, and the ranks' are added."""
    own, rows, hidden = split.sent, split.rows, split.hidden_size
    if split.tp_size > 1:
        yield vector(2 * own * INT32)  # to where the collective reads it
        yield Collective("gather", split.tp_size, own * INT32, split.tp_size)
        yield vector(2 * rows * INT32)  # others' tokens are masked
    yield Kernel("vector", rows * hidden * BF16, weight_bytes=own * hidden * BF16)
    if split.tp_size > 1:
        yield vector(2 * rows * hidden * BF16)
        yield vector(rows * hidden * BF16)
        yield Collective("scatter", split.tp_size, own * hidden * BF16, split.tp_size)


def _linear(split: EngineSplit, inner: int, columns: int) -> _Steps:
    if split.way is not Arithmetic.FLOAT:
        yield vector(split.rows * inner * 3)
    yield multiply(split.rows, inner, columns, split.way, BF16)


_STEPS: dict[Part, Callable[[EngineSplit], _Steps]] = {
    O_PROJ: _o_proj,
    LM_HEAD: _lm_head,
    EMBEDDING: _embedding,
}
