"""From checkpoints to the estimate: a row for each group size, out of the plan that `split` would write."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from reshard.checkpoint.description import Checkpoint
from reshard.errors import AlignmentError, ProfileError, SchemeError, UsageError
from reshard.estimate.document import Alignment, Estimate, FixedRows, Refused, SchemeEstimate, Size
from reshard.estimate.engine_step import EngineSplit, engine_steps
from reshard.estimate.profile import Profile, Tiles
from reshard.estimate.recommend import choose, recommend, refusal
from reshard.estimate.step import SWIGLU, Run, Split, level_for, run, run_layers, runs_as
from reshard.model.parts import DENSE_FFN, DOWN, EMBEDDING, GATE, Module
from reshard.plan.plan import Plan, Ways, make_plan
from reshard.schemes.table import BLOCK, SCHEMES, Arithmetic
from reshard.tensors.dtypes import RANKS_IN_OWN_TYPE, nbytes
from reshard.tensors.tiles import limit_faults, tile_faults


@dataclass(frozen=True)
class Options:
    """tokens: of each data-parallel rank, in one decode step. as_bf16: the option that has the weights in BF16.

    The others: see `reshard.estimate.step.Split`.
    """

    tokens: int
    reduce_bytes: int = 2
    pad: bool = False
    max_tokens: int | None = None
    tensor_parallel_size: int = 1
    as_bf16: str = Ways.bf16

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.tokens:
            raise UsageError(
                f"--max-tokens {self.max_tokens}: every rank sends so many rows, and --batch gives it {self.tokens} "
                f"tokens; give --max-tokens {self.tokens} or more"
            )


@dataclass(frozen=True)
class Wanted:
    """A part of a checkpoint, and the group sizes to compare. scheme: what it goes by, with other parts beside it."""

    scheme: str
    checkpoint: Checkpoint
    tp_sizes: Sequence[int]


def estimate(wanted: Sequence[Wanted], profile: Profile, options: Options) -> Estimate:
    """Estimate parts of a checkpoint, by scheme. A size that cannot be cut or connected is refused by itself.

    Raises SchemeError for float32 weights, whose rate no profile has, ProfileError for rates next to zero, UsageError
    for a part that is not estimated beside tensor parallelism.
    """
    parts = {each.checkpoint.part: each.checkpoint for each in wanted}
    beside = next((part.key for part in parts if part is not DENSE_FFN), None)
    if options.tensor_parallel_size > 1 and beside is not None:
        raise UsageError(
            f"--tensor-parallel-size {options.tensor_parallel_size}: beside it only {DENSE_FFN.key} is estimated; "
            f"leave --part {beside} out"
        )
    first = wanted[0].checkpoint
    schemes = tuple(_scheme(each, profile, options) for each in wanted)
    names = dict.fromkeys(one.scheme for one in schemes) if len(parts) > 1 else ()
    return Estimate(
        source=first.identity.name,
        model=first.model.model_copy(update={k: v for one in parts.values() for k, v in one.model.sizes.items()}),
        layers=tuple(layer.number for layer in parts[DENSE_FFN].layers) if DENSE_FFN in parts else (),
        batch=options.tokens,
        max_tokens=options.max_tokens,
        tensor_parallel_size=options.tensor_parallel_size,
        reduce_bytes=options.reduce_bytes,
        device=profile.model_dump(exclude_none=True),
        notes=tuple(_notes(wanted, schemes, options)),
        schemes=schemes,
        chosen=tuple(choose(name, [one for one in schemes if one.scheme == name]) for name in names),
    )


def _scheme(wanted: Wanted, profile: Profile, options: Options) -> SchemeEstimate:
    checkpoint = wanted.checkpoint
    for tensor in checkpoint.tensors():
        if tensor.name.endswith(".weight") and tensor.dtype == "F32":
            raise SchemeError(
                f"{tensor.name}: is F32, and device profiles have no rate for it; estimate what it would be served as: "
                f"{options.as_bf16}"
            )
    base = options.tensor_parallel_size
    unsplit = _size(checkpoint, _plan(checkpoint, base, options, lambda size: True), profile, options, None)
    sizes: list[Size] = []
    refused: list[Refused] = []

    def sized(tp_size: int, takes: Callable[[int], bool]) -> Size:
        if tp_size % base:
            raise AlignmentError(f"it counts tensor-parallel ranks, too: expected a multiple of {base}")
        level_for(profile, tp_size)
        return _size(checkpoint, _plan(checkpoint, tp_size, options, takes), profile, options, unsplit.held_bytes)

    def takes(tp_size: int) -> bool:
        try:
            return refusal(profile, sized(tp_size, lambda size: True)) is None
        except (AlignmentError, ProfileError):
            return False

    for tp_size in wanted.tp_sizes:
        try:
            sizes.append(sized(tp_size, takes))
        except (AlignmentError, ProfileError) as error:
            refused.append(Refused(tp_size, str(error)))
    recommended, reasons = recommend(profile, unsplit, sizes)
    return SchemeEstimate(
        scheme=wanted.scheme,
        part=checkpoint.part.key,
        layers=len(checkpoint.layers),
        unsplit_bytes=unsplit.held_bytes,
        unsplit_seconds=unsplit.runs.step_seconds,
        sizes=tuple(sizes),
        refused=tuple(refused),
        recommended=recommended,
        reasons=tuple(reasons),
    )


def _notes(wanted: Sequence[Wanted], schemes: Sequence[SchemeEstimate], options: Options) -> Iterator[str]:
    """Sizes that cannot be, cuts that do not fit, and what the figures leave out."""
    layers = [layer for each in wanted for layer in each.checkpoint.layers]
    for each, one in zip(wanted, schemes, strict=True):
        yield from (f"{one.label} tp {refused.tp_size}: not possible: {refused.reason}" for refused in one.refused)
        yield from (f"{one.label} tp {size.tp_size}: {note}" for size in one.sizes for note in size.alignment.notes)
        linears = (linear for layer in each.checkpoint.layers for linear in layer.linears.values())
        if any(runs_as(each) is Arithmetic.FLOAT and not SCHEMES[each.variant.scheme].is_float for each in linears):
            yield f"{one.label}: no kernel multiplies it as it is; held and run as BF16"
    activations = {layer.activation for layer in layers}
    for name in sorted(str(activation) for activation in activations if activation and not activation.is_known):
        yield f"activation {name}: its formula is not known; it is counted as SwiGLU"
    dense = [one for one in schemes if one.part == DENSE_FFN.key]
    ranks = max((size.tp_size for one in dense for size in one.sizes), default=0)
    if options.reduce_bytes == 2 and ranks > RANKS_IN_OWN_TYPE:
        yield (
            f"partial sums are counted in BF16; of more than {RANKS_IN_OWN_TYPE} ranks the runtime sends them in "
            "float32 unless told otherwise: --reduce-dtype float32"
        )


def _plan(checkpoint: Checkpoint, tp_size: int, options: Options, takes: Callable[[int], bool]) -> Plan:
    """Rank 0's part, which is as large as every rank's.

    A device that holds everything stacks nothing, so that scale blocks need not divide.
    """
    layout, ways = "separate" if tp_size == 1 else "fused", Ways(takes, bf16=options.as_bf16)
    return make_plan(checkpoint, tp_size, layout, options.pad, tp_ranks=(0,), ways=ways)


def _size(checkpoint: Checkpoint, plan: Plan, profile: Profile, options: Options, unsplit: int | None) -> Size:
    part, hidden = checkpoint.part, checkpoint.model.hidden_size
    padded = plan.padding.padded if plan.padding else checkpoint.shared_size
    share, held = padded // plan.tp_size, _held(checkpoint, plan)
    as_bf16, as_int8, exact = (_dense_runs if part is DENSE_FFN else _engine_runs)(
        checkpoint, plan.tp_size, share, profile, options
    )
    runs = as_int8 or as_bf16
    tiles = None if part is EMBEDDING else profile.alignment  # which is looked up, not multiplied
    ways = [(module, runs_as(each[0])) for layer in checkpoint.layers for module, each in layer.modules("fused")]
    return Size(
        tp_size=plan.tp_size,
        share=share,
        padded=plan.padding is not None,
        held_bytes=held,
        shard_tensor_bytes=sum(tensor.nbytes for tensor in plan.shards[0].tensors),
        saved_bytes=(held if unsplit is None else unsplit) - held,
        network=level_for(profile, plan.tp_size)[0],
        alignment=alignment(tiles, share, hidden, ways, blocks=part.quantized),
        gathered_as_bf16=as_bf16,
        gathered_as_int8=as_int8,
        fixed_rows=FixedRows(runs.rows_per_layer - exact.rows_per_layer, runs, exact) if exact else None,
    )


_Runs = tuple[Run, Run | None, Run | None]
"""Gathered as BF16 and as int8, and with as many rows as tokens where they are fixed."""


def _dense_runs(checkpoint: Checkpoint, tp_size: int, share: int, profile: Profile, options: Options) -> _Runs:
    splits = [
        Split(
            tp_size=tp_size,
            tokens=options.tokens,
            hidden_size=checkpoint.model.hidden_size,
            share=share,
            gate_up=runs_as(layer.linears[GATE]),
            down=runs_as(layer.linears[DOWN]),
            reduce_bytes=options.reduce_bytes,
            max_tokens=options.max_tokens,
            tensor_parallel_size=options.tensor_parallel_size,
            activation=layer.activation or SWIGLU,
        )
        for layer in checkpoint.layers
    ]
    quantized = any(split.gate_up is not Arithmetic.FLOAT for split in splits)
    return (
        run(profile, [replace(split, quantize_first=False) for split in splits]),
        run(profile, splits) if quantized else None,
        run(profile, [replace(split, max_tokens=None) for split in splits]) if splits[0].fixed else None,
    )


def _engine_runs(checkpoint: Checkpoint, tp_size: int, share: int, profile: Profile, options: Options) -> _Runs:
    """The engine quantizes behind the gather."""
    hidden, (role,) = checkpoint.model.hidden_size, checkpoint.part.roles

    def with_rows(rows: int | None) -> Run:
        splits = [
            EngineSplit(
                checkpoint.part, tp_size, options.tokens, hidden, share, runs_as(layer.linears[role.name]), rows
            )
            for layer in checkpoint.layers
        ]
        return run_layers(profile, [list(engine_steps(split)) for split in splits], options.tokens, splits[0].rows)

    fixed = options.max_tokens is not None and tp_size > 1
    return with_rows(options.max_tokens), None, with_rows(None) if fixed else None


def _held(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of the shard's tensors; of linears that run as BF16, their weights in BF16 and no scales."""
    as_bf16: set[str] = set()
    for layer in checkpoint.layers:
        for role, linear in layer.linears.items():
            if runs_as(linear) is Arithmetic.FLOAT:
                as_bf16 |= {layer.name(role), layer.name(layer.part.stack(role) or role)}
    held = 0
    for tensor in plan.shards[0].tensors:
        module, _, suffix = tensor.name.rpartition(".")
        if module not in as_bf16:
            held += tensor.nbytes
        elif suffix == "weight":
            held += nbytes("BF16", tensor.shape)
    return held


def alignment(
    tiles: Tiles | None, share: int, hidden: int, ways: Iterable[tuple[Module, Arithmetic]], blocks: bool = True
) -> Alignment:
    """The verdict on a part's matrices, each with how it is run; see reshard.tensors.tiles.

    blocks: whether they may have scale blocks.
    """
    whole = share % BLOCK[0] == 0 if blocks else None
    if tiles is None:
        return Alignment(None, whole)
    padding: list[str] = []
    too_wide: list[str] = []
    for module, way in dict.fromkeys(ways):
        is_float = way is Arithmetic.FLOAT
        number, tile = ("BF16", tiles.bf16_tile) if is_float else ("INT8", tiles.int8_tile)
        padding += tile_faults(module, share, hidden, tile, number)
        if not is_float:
            too_wide += limit_faults(module, share, hidden, tiles.last_dim_limit)
    return Alignment(not padding, whole, bool(too_wide), (*dict.fromkeys(padding), *too_wide[:1]))
