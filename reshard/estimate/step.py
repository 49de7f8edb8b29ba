"""One decode step through one dense layer on one rank: the kernels and collectives that `reshard_runtime.ffn` issues
and, with fixed rows or beside tensor parallelism, `reshard_runtime.serving.vllm.split_mlp`; what each takes and sends.

T tokens that a rank brings, N rows that it sends, R tp_size, H hidden_size, L the rank's share of intermediate_size.
Peaks times the profile's efficiencies are the rates. docs/estimate.md has the formulas and their sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, log2
from typing import Literal, get_args

from reshard.checkpoint.description import Linear
from reshard.errors import ProfileError
from reshard.estimate.profile import GIB, MIB, Network, Profile
from reshard.model.activation import SILU, Activation
from reshard.schemes.table import Arithmetic, scheme_named

Kind = Literal["matmul", "vector", "gather", "exchange", "scatter"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SWIGLU = Activation(SILU)
BF16, INT32 = 2, 4  # bytes
_SCALE = 4
_FLOAT, _DYNAMIC = Arithmetic.FLOAT, Arithmetic.DYNAMIC


def runs_as(linear: Linear) -> Arithmetic:
    """How a linear is run on an NPU, and on every other backend: FLOAT, DYNAMIC or STATIC."""
    return scheme_named(linear.variant.scheme, "--scheme").runs_as("npu")


@dataclass(frozen=True)
class Kernel:
    """A matrix product or, without operations, an element-wise kernel, whose arithmetic is not counted.

    Weights come from memory each time: between two steps the rest of the model has gone through the cache. Activations,
    read and written, come from it where they do not fit the cache.
    """

    kind: Kind
    activation_bytes: int
    int8: bool = False
    operations: int = 0
    weight_bytes: int = 0

    def seconds(self, profile: Profile) -> float:
        """The roofline, max(operations / rate, bytes / bandwidth), + static cost; without overlap, the sum of both."""
        compute, share = profile.compute, profile.efficiency
        peak, reached = (
            (compute.int8_tops, share.memory_int8) if self.int8 else (compute.bf16_tflops, share.memory_bf16)
        )
        uncached = self.activation_bytes if self.activation_bytes > profile.memory.cache_mib * MIB else 0
        multiplying = self.operations / (peak * 1e12 * share.compute)
        reading = (self.weight_bytes + uncached) / (profile.memory.bandwidth_gib_s * GIB * reached)
        static = profile.static.matmul_us if self.kind == "matmul" else profile.static.vector_us
        return (max(multiplying, reading) if compute.overlap else multiplying + reading) + static * 1e-6


@dataclass(frozen=True)
class Collective:
    """all_gather of n = `nbytes` from each rank; all_to_all or reduce_scatter of n to each; all_reduce, both of n / R.

    span: devices side by side among which the ranks lie.
    """

    kind: Kind
    ranks: int
    nbytes: int
    span: int
    all_reduce: bool = False

    def seconds(self, profile: Profile) -> float:
        """Data + latency + static cost; all at the rate of the network's level that holds the span, an upper bound."""
        _, level = level_for(profile, self.span)
        bandwidth = level.bandwidth_gb_s * 1e9 * profile.efficiency.communication
        rounds, nbytes = (2, self.nbytes / self.ranks) if self.all_reduce else (1, self.nbytes)
        if level.topology == "mesh" and level.devices is not None:  # each pair has a link, and all carry data at once
            data, steps = nbytes / (bandwidth / (level.devices - 1)), self.ranks - 1
        else:  # recursive doubling or halving
            data, steps = (self.ranks - 1) * nbytes / bandwidth, ceil(log2(self.ranks))
        return rounds * (data + steps * level.latency_us * 1e-6) + profile.static.collective_us * 1e-6

    @property
    def sent(self) -> int:
        """Bytes that a rank sends."""
        nbytes = (self.ranks - 1) * self.nbytes
        return 2 * nbytes // self.ranks if self.all_reduce else nbytes

    def messages(self, profile: Profile) -> int:
        """That a rank sends: in a mesh one to each other rank, over a switch one after another."""
        mesh = level_for(profile, self.span)[1].topology == "mesh"
        return (2 if self.all_reduce else 1) * (self.ranks - 1 if mesh else ceil(log2(self.ranks)))


def level_for(profile: Profile, ranks: int) -> tuple[str, Network]:
    """The innermost level of the network that holds so many ranks, side by side. Raises ProfileError if none does."""
    for name, level in profile.network.items():
        if level.devices is None or ranks <= level.devices:
            return name, level
    *_, (name, last) = profile.network.items()
    raise ProfileError(f"{profile.name}: its network.{name} ends at {last.devices} devices, the group has {ranks}")


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
    gate_up: Arithmetic
    down: Arithmetic
    quantize_first: bool = True
    reduce_bytes: int = 2
    max_tokens: int | None = None
    tensor_parallel_size: int = 1
    activation: Activation = SWIGLU

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
        if self.gate_up is _FLOAT or not self.quantize_first:
            return BF16 * self.hidden_size
        return self.hidden_size + (_SCALE if self.gate_up is _DYNAMIC else 0)


def steps(split: Split) -> Iterator[Kernel | Collective]:
    """What the rank does, one after another: nothing is overlapped."""
    own, sent, rows, hidden, share = split.tokens, split.sent, split.rows, split.hidden_size, split.share
    copies, sum_bytes = split.tensor_parallel_size, split.reduce_bytes
    travels, added, quantized = split.senders > 1, split.tp_size > 1, split.gate_up is not _FLOAT

    if quantized and (split.quantize_first or not travels):
        yield vector(own * hidden * 3)
    packed = travels and split.gate_up is _DYNAMIC and split.quantize_first
    if packed:
        yield vector(2 * own * split.token_bytes)  # integers and scale into one message
    if split.fixed:
        yield vector(2 * own * split.token_bytes)  # to where the collective reads it
        if sent > own:
            yield vector((sent - own) * split.token_bytes)  # zeros below
    if travels:
        yield Collective("gather", split.senders, sent * split.token_bytes, split.tp_size)
    if packed:
        yield vector(2 * rows * hidden)  # and apart again
        yield vector(2 * rows * _SCALE)
    if quantized and travels and not split.quantize_first:
        yield vector(rows * hidden * 3)
    fused = split.gate_up is split.down is _DYNAMIC and split.activation == SWIGLU
    yield multiply(rows, hidden, 2 * share, split.gate_up, INT32 if fused else BF16)
    if fused:
        yield vector(rows * share * (2 * INT32 + 1))  # dequantize, SwiGLU, quantize in one
    else:
        for halves in _activation(split.activation):
            yield vector(rows * share * halves * BF16)
        if split.down is not _FLOAT:
            yield vector(rows * share * 3)
    yield multiply(rows, share, hidden, split.down, sum_bytes if added else BF16)
    widened = added and sum_bytes > BF16
    if widened:
        yield vector(rows * hidden * (BF16 + sum_bytes))
    if split.fixed:
        yield vector(2 * rows * hidden * sum_bytes)  # to where the collective reads it
    if travels:
        yield Collective("scatter", split.senders, sent * hidden * sum_bytes, split.tp_size)
    if copies > 1:
        yield Collective("scatter", copies, own * hidden * sum_bytes, copies, all_reduce=True)
    if widened:
        yield vector(own * hidden * (BF16 + sum_bytes))
    elif split.fixed:
        yield vector(2 * own * hidden * BF16)  # from where the next layer's collective writes


def vector(nbytes: int) -> Kernel:
    """A kernel that reads and writes so much."""
    return Kernel("vector", nbytes)


def multiply(rows: int, inner: int, columns: int, way: Arithmetic, out: int) -> Kernel:
    """[rows, inner] x [inner, columns], whose results have `out` bytes each."""
    each = BF16 if way is _FLOAT else 1
    moved = rows * (inner * each + columns * out)
    return Kernel("matmul", moved, way is not _FLOAT, 2 * rows * inner * columns, inner * columns * each)


def _activation(activation: Activation) -> tuple[int, ...]:
    """For each kernel of it on an NPU, how many [rows, L] it reads and writes; an unknown one is counted as SwiGLU.

    npu_swiglu and npu_clipped_swiglu read gate and up and write the product; npu_geglu writes gelu(gate) as well, and
    has no limit: gate and up are clamped in place before it.
    """
    if activation.name == SILU or not activation.is_known:
        return (3,)
    return (4,) if activation.limit is None else (2, 2, 4)


@dataclass(frozen=True)
class Run:
    """One decode step through all layers that have the part. Bytes and messages: of the layer that sends the most."""

    rows_per_layer: int
    gather_bytes_per_layer: int
    exchange_bytes_per_layer: int
    scatter_bytes_per_layer: int
    gather_bytes_per_token_layer: int
    exchange_bytes_per_token_layer: int
    scatter_bytes_per_token_layer: int
    messages_per_layer: int
    messages_per_token_layer: float
    layer_seconds: float
    step_seconds: float
    seconds: dict[Kind, float]

    @property
    def sent_bytes_per_layer(self) -> int:
        """Of all collectives."""
        return self.gather_bytes_per_layer + self.exchange_bytes_per_layer + self.scatter_bytes_per_layer


def run(profile: Profile, splits: Sequence[Split]) -> Run:
    """All dense layers, with the same rows."""
    return run_layers(profile, [list(steps(split)) for split in splits], splits[0].tokens, splits[0].rows)


def run_layers(profile: Profile, layers: Sequence[Sequence[Kernel | Collective]], tokens: int, rows: int) -> Run:
    """All layers, from the steps of each."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for step in chain.from_iterable(layers):
        seconds[step.kind] += step.seconds(profile)
    whole = sum(seconds.values())
    sent, messages = max((_sent(profile, layer) for layer in layers), key=lambda each: sum(each[0].values()))
    return Run(
        rows_per_layer=rows,
        gather_bytes_per_layer=sent["gather"],
        exchange_bytes_per_layer=sent["exchange"],
        scatter_bytes_per_layer=sent["scatter"],
        gather_bytes_per_token_layer=round(sent["gather"] / tokens),
        exchange_bytes_per_token_layer=round(sent["exchange"] / tokens),
        scatter_bytes_per_token_layer=round(sent["scatter"] / tokens),
        messages_per_layer=messages,
        messages_per_token_layer=messages / tokens,
        layer_seconds=whole / len(layers),
        step_seconds=whole,
        seconds=seconds,
    )


def _sent(profile: Profile, layer: Sequence[Kernel | Collective]) -> tuple[dict[Kind, int], int]:
    """What a rank sends for a layer: bytes by kind (what is all-reduced among the sums), and messages."""
    collectives = [step for step in layer if isinstance(step, Collective)]
    sent: dict[Kind, int] = {kind: sum(step.sent for step in collectives if step.kind == kind) for kind in KINDS}
    return sent, sum(step.messages(profile) for step in collectives)
