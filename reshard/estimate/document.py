"""The estimate as JSON, and what is to be said beside its figures."""

from collections.abc import Sequence
from typing import Any

from reshard.checkpoint.description import Checkpoint
from reshard.estimate.fixed import FixedRows, Pass
from reshard.estimate.profile import Profile
from reshard.estimate.recommend import Recommendation
from reshard.estimate.sizes import Estimate, Gathered, Options, Size

_RANKS_IN_OWN_TYPE = (
    8  # reshard_runtime.collectives: more ranks' partial sums travel in float32 where the collective adds
)


def document(
    checkpoint: Checkpoint,
    profile: Profile,
    options: Options,
    found: Sequence[Estimate],
    chosen: Sequence[Recommendation],
    costs: Sequence[FixedRows],
) -> dict[str, Any]:
    """All of an estimate, and the profile with the sources of its values."""
    by_size = {(cost.scheme, cost.tp_size): cost for cost in costs}
    return {
        "source": checkpoint.identity.name,
        "model": vars(checkpoint.model),
        "layers": [layer.index for layer in checkpoint.layers],
        "batch": options.tokens,
        "max_tokens": options.max_tokens,
        "tensor_parallel_size": options.tensor_parallel_size,
        "reduce_bytes": options.reduce_bytes,
        "device": profile.model_dump(exclude_none=True),
        "notes": notes(found, options),
        "schemes": [
            {
                "scheme": one.scheme,
                "unsplit_bytes": one.unsplit.held,
                "unsplit_seconds": one.unsplit.runs.step_seconds,
                "sizes": [
                    _size_document(size, options.tokens)
                    | {"fixed_rows": _fixed_document(by_size.get((one.scheme, size.tp_size)))}
                    for size in one.sizes
                ],
                "refused": [vars(refused) for refused in one.refused],
                "recommended": choice.tp_size,
                "reasons": list(choice.reasons),
            }
            for one, choice in zip(found, chosen, strict=True)
        ],
    }


def _size_document(size: Size, tokens: int) -> dict[str, Any]:
    def gathered(what: Gathered) -> dict[str, Any]:
        return {
            "gather_bytes_per_token_layer": round(what.wire.gathered / tokens),
            "scatter_bytes_per_token_layer": round(what.wire.scattered / tokens),
            "messages_per_layer": what.wire.messages,
            "messages_per_token_layer": what.wire.messages / tokens,
            "step_seconds": what.step_seconds,
            "seconds": dict(what.seconds),
        }

    return {
        "tp_size": size.tp_size,
        "share": size.share,
        "padded": size.padded,
        "held_bytes": size.held,
        "shard_tensor_bytes": size.shard,
        "saved_bytes": size.saved,
        "network": size.network,
        "alignment": {
            "tiles": size.alignment.tiles,
            "blocks": size.alignment.blocks,
            "too_wide": size.alignment.too_wide is not None,
            "notes": list(size.alignment.notes),
        },
        "gathered_as_bf16": gathered(size.as_bf16),
        "gathered_as_int8": gathered(size.as_int8) if size.as_int8 else None,
    }


def _fixed_document(cost: FixedRows | None) -> dict[str, Any] | None:
    def way(what: Pass) -> dict[str, Any]:
        return {
            "rows_per_layer": what.rows,
            "gather_bytes_per_layer": what.gathered,
            "scatter_bytes_per_layer": what.scattered,
            "layer_seconds": what.layer_seconds,
            "step_seconds": what.step_seconds,
        }

    if cost is None:
        return None
    return {"unneeded_rows_per_layer": cost.unneeded, "fixed": way(cost.fixed), "exact": way(cost.exact)}


def notes(found: Sequence[Estimate], options: Options) -> list[str]:
    """Sizes that cannot be, cuts that do not fit, and what the figures leave out."""
    said = []
    for one in found:
        said += [f"{one.scheme} tp {refused.tp_size}: not possible: {refused.reason}" for refused in one.refused]
        said += [f"{one.scheme} tp {size.tp_size}: {note}" for size in one.sizes for note in size.alignment.notes]
        if one.as_bf16:
            said.append(f"{one.scheme}: no kernel multiplies it as it is; held and run as BF16")
    if options.reduce_bytes == 2 and any(size.tp_size > _RANKS_IN_OWN_TYPE for one in found for size in one.sizes):
        said.append(
            f"partial sums are counted in BF16; of more than {_RANKS_IN_OWN_TYPE} ranks the runtime sends them in "
            "float32 unless told otherwise: --reduce-dtype float32"
        )
    return said
