"""The estimate of one scheme: a row for each group size, out of the plan that `split` would write."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from reshard.checkpoint.description import Checkpoint
from reshard.errors import AlignmentError, ProfileError, SchemeError, UsageError
from reshard.estimate.alignment import Verdict, verdict
from reshard.estimate.model import GIB, level_for
from reshard.estimate.profile import Profile
from reshard.estimate.step import Kind, Split, Way, Wire, layer_seconds, way_of, wire_of
from reshard.model.naming import DOWN, GATE, GATE_UP
from reshard.plan.plan import Plan, make_plan
from reshard.tensors.dtypes import nbytes

_BF16_BYTES = 2


@dataclass(frozen=True)
class Options:
    """tokens: of each data-parallel rank, in one decode step. The others: see `reshard.estimate.step.Split`.

    Raises UsageError for more tokens than rows.
    """

    tokens: int
    reduce_bytes: int = 2
    pad: bool = False
    max_tokens: int | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.tokens:
            raise UsageError(
                f"--max-tokens {self.max_tokens}: every rank sends so many rows, and --batch gives it {self.tokens} "
                f"tokens; give --max-tokens {self.tokens} or more"
            )


@dataclass(frozen=True)
class Gathered:
    """What depends on how tokens travel to the others: on the wire a layer, and a step's seconds."""

    wire: Wire
    seconds: dict[Kind, float]

    @property
    def step_seconds(self) -> float:
        """One decode step through all dense layers."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Size:
    """A group size.

    held: bytes of all dense layers on a device, as it runs them; shard: as the file has them. as_int8 is None where
    tokens are not quantized (BF16, and what is run as BF16).
    """

    tp_size: int
    share: int
    padded: bool
    held: int
    shard: int
    saved: int
    network: str
    alignment: Verdict
    as_bf16: Gathered
    as_int8: Gathered | None

    @property
    def runs(self) -> Gathered:
        """What the runtime does: it quantizes before the gather where the layer is quantized."""
        return self.as_int8 or self.as_bf16


@dataclass(frozen=True)
class Refused:
    """A group size that cannot be, and why."""

    tp_size: int
    reason: str


@dataclass(frozen=True)
class Estimate:
    """One scheme's sizes, in the order asked for.

    unsplit: the size that is the tensor-parallel one, 1 without, asked for or not. as_bf16: the file's weights are no
    BF16, and are run as such.
    """

    scheme: str
    unsplit: Size
    sizes: tuple[Size, ...]
    refused: tuple[Refused, ...]
    as_bf16: bool


def estimate(
    checkpoint: Checkpoint, scheme: str, tp_sizes: Iterable[int], profile: Profile, options: Options
) -> Estimate:
    """Estimate a checkpoint for group sizes. A size that cannot be cut or connected is refused by itself.

    Raises SchemeError for float32 weights, whose rate no profile has, ProfileError for rates next to zero.
    """
    _check_types(checkpoint)
    base = options.tensor_parallel_size
    unsplit = _size(checkpoint, _plan(checkpoint, base, options), profile, options, None)
    sizes: list[Size] = []
    refused: list[Refused] = []
    for tp_size in tp_sizes:
        if tp_size % base:
            refused.append(Refused(tp_size, f"it counts tensor-parallel ranks, too: a multiple of {base} is wanted"))
            continue
        try:
            level_for(profile, tp_size)
            plan = _plan(checkpoint, tp_size, options)
        except (AlignmentError, ProfileError) as error:
            refused.append(Refused(tp_size, str(error)))
            continue
        sizes.append(_size(checkpoint, plan, profile, options, unsplit.held))
    schemes = {linear.variant.scheme for layer in checkpoint.layers for linear in layer.linears.values()}
    as_bf16 = any(scheme != "bf16" and way_of(scheme) == "bf16" for scheme in schemes)
    return Estimate(scheme, unsplit, tuple(sizes), tuple(refused), as_bf16)


def _plan(checkpoint: Checkpoint, tp_size: int, options: Options) -> Plan:
    """Rank 0's part, which is as large as every rank's.

    A device that holds everything stacks nothing, so that scale blocks need not divide.
    """
    return make_plan(checkpoint, tp_size, "separate" if tp_size == 1 else "fused", options.pad, tp_ranks=(0,))


def _check_types(checkpoint: Checkpoint) -> None:
    for tensor in checkpoint.tensors():
        if tensor.name.endswith(".weight") and tensor.dtype == "F32":
            raise SchemeError(
                f"{tensor.name}: is F32, and device profiles have no rate for it; estimate what it would be served as: "
                "--scheme bf16"
            )


def _size(checkpoint: Checkpoint, plan: Plan, profile: Profile, options: Options, unsplit: int | None) -> Size:
    model = checkpoint.model
    padded = plan.padding.padded if plan.padding else model.intermediate_size
    share, held = padded // plan.tp_size, _held(checkpoint, plan)
    ways = [
        (way_of(layer.linears[GATE].variant.scheme), way_of(layer.linears[DOWN].variant.scheme))
        for layer in checkpoint.layers
    ]
    splits = [
        Split(
            tp_size=plan.tp_size,
            tokens=options.tokens,
            hidden_size=model.hidden_size,
            share=share,
            gate_up=gate_up,
            down=down,
            quantize_first=False,
            reduce_bytes=options.reduce_bytes,
            max_tokens=options.max_tokens,
            tensor_parallel_size=options.tensor_parallel_size,
        )
        for gate_up, down in ways
    ]
    quantized = any(gate_up != "bf16" for gate_up, _ in ways)
    first = [replace(split, quantize_first=True) for split in splits]
    return Size(
        tp_size=plan.tp_size,
        share=share,
        padded=plan.padding is not None,
        held=held,
        shard=sum(tensor.nbytes for tensor in plan.shards[0].tensors),
        saved=(held if unsplit is None else unsplit) - held,
        network=level_for(profile, plan.tp_size)[0],
        alignment=verdict(profile.alignment, share, model.hidden_size, ways),
        as_bf16=_gathered(profile, splits),
        as_int8=_gathered(profile, first) if quantized else None,
    )


def _held(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of the shard's tensors; of linears that run as BF16, their weights in BF16 and no scales."""
    ways: dict[str, Way] = {}
    for layer in checkpoint.layers:
        for role, linear in layer.linears.items():
            ways[f"{layer.module}.{role}"] = way_of(linear.variant.scheme)
        ways[f"{layer.module}.{GATE_UP}"] = ways[f"{layer.module}.{GATE}"]
    return sum(_bytes_held(t.name, t.dtype, t.shape, ways) for t in plan.shards[0].tensors)


def _bytes_held(name: str, dtype: str, shape: tuple[int, ...], ways: dict[str, Way]) -> int:
    module, _, suffix = name.rpartition(".")
    if ways[module] != "bf16":
        return nbytes(dtype, shape)
    return nbytes("BF16", shape) if suffix == "weight" else 0


def _gathered(profile: Profile, splits: Sequence[Split]) -> Gathered:
    """All layers' seconds by kind; the wire of the layer that sends the most."""
    seconds: dict[Kind, float] = {}
    for split in splits:
        for kind, value in layer_seconds(profile, split).items():
            seconds[kind] = seconds.get(kind, 0.0) + value
    if not isfinite(sum(seconds.values())):
        raise ProfileError(f"{profile.name}: its rates are so low that a step takes forever")
    return Gathered(max((wire_of(profile, split) for split in splits), key=lambda wire: wire.nbytes), seconds)


def fits_memory(profile: Profile, size: Size) -> bool:
    """Whether the dense layers alone are within the device's memory."""
    return size.held <= profile.memory.capacity_gib * GIB
