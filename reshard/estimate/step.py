"""One decode step through one dense layer on one rank: its kernels and collectives, as `reshard_runtime.ffn` issues
them, and with fixed rows or beside tensor parallelism as `reshard_runtime.serving.vllm.split_mlp` does.

T tokens that a rank brings, N rows that it sends, R tp_size, H hidden_size, L the rank's share of intermediate_size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from reshard.estimate.model import (
    Matmul,
    Number,
    all_reduce_seconds,
    collective_seconds,
    matmul_seconds,
    messages,
    vector_seconds,
)
from reshard.estimate.profile import Profile

Way = Literal["bf16", "dynamic", "static"]
Kind = Literal["matmul", "vector", "gather", "scatter"]
KINDS: tuple[Kind, ...] = ("matmul", "vector", "gather", "scatter")

_BF16, _INT32, _SCALE = 2, 4, 4  # bytes
# Schemes as the runtime runs them; those of the first row become BF16 at load (reshard_runtime.dequantize).
_WAYS: dict[str, Way] = {
    **dict.fromkeys(("bf16", "fp8_block", "fp8_channel", "int8_block"), "bf16"),
    "w8a8_dynamic": "dynamic",
    "w8a8_mix": "dynamic",
    "w8a8_static": "static",
}


def way_of(scheme: str) -> Way:
    """How a scheme's linears are run."""
    return _WAYS[scheme]


@dataclass(frozen=True)
class Split:
    """A dense layer on one rank, and what each step brings.

    quantize_first: W8A8 tokens are quantized before the gather, as the runtime does, and travel as int8.
    reduce_bytes: of one partial sum as it travels, 2 for BF16, 4 for float32.
    max_tokens: N where it is fixed, at least T; None: as many rows as tokens.
    tensor_parallel_size: of the R ranks, so many hold the same tokens.
    """

    tp_size: int
    tokens: int
    hidden_size: int
    share: int
    gate_up: Way
    down: Way
    quantize_first: bool = True
    reduce_bytes: int = 2
    max_tokens: int | None = None
    tensor_parallel_size: int = 1

    @property
    def senders(self) -> int:
        """Ranks that send one another their rows: those at one tensor-parallel rank."""
        return self.tp_size // self.tensor_parallel_size

    @property
    def fixed(self) -> bool:
        """Whether the number of rows is fixed; of rows that stay where they are it never is."""
        return self.max_tokens is not None and self.senders > 1

    @property
    def sent(self) -> int:
        """Rows that a rank sends, or keeps."""
        return self.max_tokens if self.max_tokens is not None and self.fixed else self.tokens

    @property
    def rows(self) -> int:
        """Rows that a rank multiplies."""
        return self.senders * self.sent

    @property
    def token_bytes(self) -> int:
        """A token on its way to the others: [H] BF16, or [H] int8 and, quantized dynamically, its scale."""
        if self.gate_up == "bf16" or not self.quantize_first:
            return _BF16 * self.hidden_size
        return self.hidden_size + (_SCALE if self.gate_up == "dynamic" else 0)


@dataclass(frozen=True)
class Wire:
    """What one rank sends for one layer: bytes, and messages, whatever the number of rows.

    all_gather brings its rows to the other senders, reduce_scatter the partial sums of their rows to them; what
    tensor-parallel ranks then add up counts as scattered, too. Each is as many messages as its time is made of: see
    `reshard.estimate.model.messages`.
    """

    gathered: int
    scattered: int
    messages: int

    @property
    def nbytes(self) -> int:
        """Bytes a layer."""
        return self.gathered + self.scattered


def wire_of(profile: Profile, split: Split) -> Wire:
    """What a layer puts on the wire."""
    others, copies, sums = split.senders - 1, split.tensor_parallel_size, split.reduce_bytes * split.hidden_size
    scattered = others * split.sent * sums + 2 * (copies - 1) * split.tokens * sums // copies
    calls = messages(profile, split.senders, split.tp_size) + messages(profile, copies)
    return Wire(others * split.sent * split.token_bytes, scattered, 2 * calls)


def layer_seconds(profile: Profile, split: Split) -> dict[Kind, float]:
    """Seconds of one layer by kind of work, one after another: nothing is overlapped."""
    found = dict.fromkeys(KINDS, 0.0)
    for kind, seconds in _steps(profile, split):
        found[kind] += seconds
    return found


def _steps(profile: Profile, split: Split) -> Iterator[tuple[Kind, float]]:
    own, sent, rows, hidden, share = split.tokens, split.sent, split.rows, split.hidden_size, split.share
    ranks, copies = split.senders, split.tensor_parallel_size
    travels, added, quantized = ranks > 1, split.tp_size > 1, split.gate_up != "bf16"

    def vector(nbytes: int) -> tuple[Kind, float]:
        return "vector", vector_seconds(profile, nbytes)

    def multiply(inner: int, columns: int, way: Way, out: int) -> tuple[Kind, float]:
        number: Number = "bf16" if way == "bf16" else "int8"
        each = 2 if way == "bf16" else 1
        moved = rows * (inner * each + columns * out)
        return "matmul", matmul_seconds(profile, Matmul(rows, inner, columns, number, inner * columns * each, moved))

    if quantized and (split.quantize_first or not travels):
        yield vector(own * hidden * 3)
    packed = travels and split.gate_up == "dynamic" and split.quantize_first
    if packed:
        yield vector(2 * own * split.token_bytes)  # integers and scale into one message
    if split.fixed:
        yield vector(2 * own * split.token_bytes)  # to where the collective reads it
        if sent > own:
            yield vector((sent - own) * split.token_bytes)  # zeros below
    if travels:
        yield "gather", collective_seconds(profile, ranks, sent * split.token_bytes, split.tp_size)
    if packed:
        yield vector(2 * rows * hidden)  # and apart again
        yield vector(2 * rows * _SCALE)
    if quantized and travels and not split.quantize_first:
        yield vector(rows * hidden * 3)
    fused = split.gate_up == split.down == "dynamic"
    yield multiply(hidden, 2 * share, split.gate_up, _INT32 if fused else _BF16)
    if fused:
        yield vector(rows * share * (2 * _INT32 + 1))  # dequantize, SwiGLU, quantize in one
    else:
        yield vector(rows * share * 3 * _BF16)
        if split.down != "bf16":
            yield vector(rows * share * 3)
    yield multiply(share, hidden, split.down, split.reduce_bytes if added else _BF16)
    widened = added and split.reduce_bytes > _BF16
    if widened:
        yield vector(rows * hidden * (_BF16 + split.reduce_bytes))
    if split.fixed:
        yield vector(2 * rows * hidden * split.reduce_bytes)  # to where the collective reads it
    if travels:
        yield "scatter", collective_seconds(profile, ranks, sent * hidden * split.reduce_bytes, split.tp_size)
    if copies > 1:
        yield "scatter", all_reduce_seconds(profile, copies, own * hidden * split.reduce_bytes)
    if widened:
        yield vector(own * hidden * (_BF16 + split.reduce_bytes))
    elif split.fixed:
        yield vector(2 * own * hidden * _BF16)  # from where the next layer's collective writes
