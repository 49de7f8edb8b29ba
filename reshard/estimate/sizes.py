"""From checkpoints to the estimate: a row for each group size, out of the plan that `split` would write."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from reshard.checkpoint.description import Checkpoint
from reshard.errors import AlignmentError, ProfileError, SchemeError, UsageError
from reshard.estimate.document import Alignment, Estimate, FixedRows, Refused, SchemeEstimate, Size
from reshard.estimate.profile import Profile, Tiles
from reshard.estimate.recommend import recommend
from reshard.estimate.step import SWIGLU, Split, level_for, run, runs_as
from reshard.model.parts import DENSE_FFN, DOWN, GATE
from reshard.plan.plan import Plan, make_plan
from reshard.schemes.table import BLOCK, SCHEMES, Arithmetic
from reshard.tensors.dtypes import RANKS_IN_OWN_TYPE, nbytes
from reshard.tensors.tiles import limit_faults, tile_faults


@dataclass(frozen=True)
class Options:
    """tokens: of each data-parallel rank, in one decode step. The others: see `reshard.estimate.step.Split`."""

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


def estimate(
    checkpoints: Mapping[str, Checkpoint], tp_sizes: Sequence[int], profile: Profile, options: Options
) -> Estimate:
    """Estimate a checkpoint, by scheme, for group sizes. A size that cannot be cut or connected is refused by itself.

    Raises SchemeError for float32 weights, whose rate no profile has, ProfileError for rates next to zero.
    """
    first = next(iter(checkpoints.values()))
    schemes = tuple(_scheme(name, each, tp_sizes, profile, options) for name, each in checkpoints.items())
    return Estimate(
        source=first.identity.name,
        model=first.model,
        layers=tuple(layer.number for layer in first.layers),
        batch=options.tokens,
        max_tokens=options.max_tokens,
        tensor_parallel_size=options.tensor_parallel_size,
        reduce_bytes=options.reduce_bytes,
        device=profile.model_dump(exclude_none=True),
        notes=tuple(_notes(checkpoints, schemes, options)),
        schemes=schemes,
    )


def _scheme(
    name: str, checkpoint: Checkpoint, tp_sizes: Sequence[int], profile: Profile, options: Options
) -> SchemeEstimate:
    for tensor in checkpoint.tensors():
        if tensor.name.endswith(".weight") and tensor.dtype == "F32":
            raise SchemeError(
                f"{tensor.name}: is F32, and device profiles have no rate for it; estimate what it would be served as: "
                "--weights bf16"
            )
    base = options.tensor_parallel_size
    unsplit = _size(checkpoint, _plan(checkpoint, base, options), profile, options, None)
    sizes: list[Size] = []
    refused: list[Refused] = []
    for tp_size in tp_sizes:
        if tp_size % base:
            refused.append(Refused(tp_size, f"it counts tensor-parallel ranks, too: expected a multiple of {base}"))
            continue
        try:
            level_for(profile, tp_size)
            plan = _plan(checkpoint, tp_size, options)
        except (AlignmentError, ProfileError) as error:
            refused.append(Refused(tp_size, str(error)))
        else:
            sizes.append(_size(checkpoint, plan, profile, options, unsplit.held_bytes))
    recommended, reasons = recommend(profile, unsplit, sizes)
    seconds = unsplit.runs.step_seconds
    return SchemeEstimate(name, unsplit.held_bytes, seconds, tuple(sizes), tuple(refused), recommended, tuple(reasons))


def _notes(checkpoints: Mapping[str, Checkpoint], schemes: Sequence[SchemeEstimate], options: Options) -> Iterator[str]:
    """Sizes that cannot be, cuts that do not fit, and what the figures leave out."""
    for one in schemes:
        yield from (f"{one.scheme} tp {refused.tp_size}: not possible: {refused.reason}" for refused in one.refused)
        yield from (f"{one.scheme} tp {size.tp_size}: {note}" for size in one.sizes for note in size.alignment.notes)
        linears = (linear for layer in checkpoints[one.scheme].layers for linear in layer.linears.values())
        if any(runs_as(each) is Arithmetic.FLOAT and not SCHEMES[each.variant.scheme].is_float for each in linears):
            yield f"{one.scheme}: no kernel multiplies it as it is; held and run as BF16"
    activations = {layer.activation for checkpoint in checkpoints.values() for layer in checkpoint.layers}
    for name in sorted(str(activation) for activation in activations if activation and not activation.is_known):
        yield f"activation {name}: its formula is not known; it is counted as SwiGLU"
    ranks = max((size.tp_size for one in schemes for size in one.sizes), default=0)
    if options.reduce_bytes == 2 and ranks > RANKS_IN_OWN_TYPE:
        yield (
            f"partial sums are counted in BF16; of more than {RANKS_IN_OWN_TYPE} ranks the runtime sends them in "
            "float32 unless told otherwise: --reduce-dtype float32"
        )


def _plan(checkpoint: Checkpoint, tp_size: int, options: Options) -> Plan:
    """Rank 0's part, which is as large as every rank's.

    A device that holds everything stacks nothing, so that scale blocks need not divide.
    """
    return make_plan(checkpoint, tp_size, "separate" if tp_size == 1 else "fused", options.pad, tp_ranks=(0,))


def _size(checkpoint: Checkpoint, plan: Plan, profile: Profile, options: Options, unsplit: int | None) -> Size:
    model = checkpoint.model
    padded = plan.padding.padded if plan.padding else checkpoint.shared_size
    share, held = padded // plan.tp_size, _held(checkpoint, plan)
    splits = [
        Split(
            tp_size=plan.tp_size,
            tokens=options.tokens,
            hidden_size=model.hidden_size,
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
    runs = run(profile, splits)
    exact = run(profile, [replace(split, max_tokens=None) for split in splits]) if splits[0].fixed else None
    quantized = any(split.gate_up is not Arithmetic.FLOAT for split in splits)
    return Size(
        tp_size=plan.tp_size,
        share=share,
        padded=plan.padding is not None,
        held_bytes=held,
        shard_tensor_bytes=sum(tensor.nbytes for tensor in plan.shards[0].tensors),
        saved_bytes=(held if unsplit is None else unsplit) - held,
        network=level_for(profile, plan.tp_size)[0],
        alignment=alignment(profile.alignment, splits),
        gathered_as_bf16=run(profile, [replace(split, quantize_first=False) for split in splits]),
        gathered_as_int8=runs if quantized else None,
        fixed_rows=FixedRows(runs.rows_per_layer - exact.rows_per_layer, runs, exact) if exact else None,
    )


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


def alignment(tiles: Tiles | None, splits: Sequence[Split]) -> Alignment:
    """The verdict on the matrices of layers of one size; see reshard.tensors.tiles."""
    share, hidden = splits[0].share, splits[0].hidden_size
    blocks = share % BLOCK[0] == 0
    if tiles is None:
        return Alignment(None, blocks)
    padding: list[str] = []
    too_wide: list[str] = []
    ways = (zip(DENSE_FFN.modules, (split.gate_up, split.down), strict=True) for split in splits)
    for module, way in dict.fromkeys(chain.from_iterable(ways)):
        is_float = way is Arithmetic.FLOAT
        number, tile = ("BF16", tiles.bf16_tile) if is_float else ("INT8", tiles.int8_tile)
        padding += tile_faults(module, share, hidden, tile, number)
        if not is_float:
            too_wide += limit_faults(module, share, hidden, tiles.last_dim_limit)
    return Alignment(not padding, blocks, bool(too_wide), (*dict.fromkeys(padding), *too_wide[:1]))
