"""The manifest of a plan: the frame around its shards' entries."""

from collections.abc import Iterable, Sequence
from typing import Any

from blake3 import blake3

from reshard import __version__
from reshard.checkpoint.description import Checkpoint, Layer
from reshard.manifest import SCHEMA, Generator, LayerEntry, Manifest, Shard, SideFile, Source
from reshard.model.parts import PARTS
from reshard.plan.plan import Plan
from reshard.schemes.table import summary
from reshard.sealed import UNSEALED


def make_manifest(
    checkpoint: Checkpoint, plan: Plan, sample: str, shards: Sequence[Shard], parts: Iterable[str] = ()
) -> Manifest:
    """The manifest of a set whose shards are all there, by rank. sample: see Prepared. parts: see Cut, in any order."""
    together = tuple(sorted(set(parts), key=list(PARTS).index))
    return Manifest(shards=list(shards), parts=together, **_frame(checkpoint, plan, sample)).sealed()


def fingerprint(checkpoint: Checkpoint, plan: Plan, sample: str) -> str:
    """What the shards of one set share: all of the manifest but the shards, and what else was cut with them."""
    frame = Manifest.model_construct(shards=[], **_frame(checkpoint, plan, sample))
    return blake3(frame.to_json()).hexdigest()


def scheme_name(layers: Iterable[Layer]) -> str:
    """One word for a checkpoint, see reshard.schemes.summary."""
    return summary({linear.variant.scheme for layer in layers for linear in layer.linears.values()})


def layer_entries(layers: Iterable[Layer]) -> list[LayerEntry]:
    """What the manifest says of each layer."""
    return [
        LayerEntry(
            index=layer.index,
            activation=layer.activation,
            linears={module.name: linears[0].entry for module, linears in layer.modules("fused")},
        )
        for layer in layers
    ]


def _frame(checkpoint: Checkpoint, plan: Plan, sample: str) -> dict[str, Any]:
    """Every field of the manifest but the shards."""
    identity = checkpoint.identity
    return {
        "schema_": SCHEMA,
        "blake3": UNSEALED,
        "generator": Generator(name="reshard", version=__version__),
        "part": checkpoint.part.key,
        "model": checkpoint.model,
        "scheme": scheme_name(checkpoint.layers),
        "tp_size": plan.tp_size,
        "layout": plan.layout,
        "padding": plan.padding,
        "layers": layer_entries(checkpoint.layers),
        "source": Source(
            kind=identity.kind,
            name=identity.name,
            commit=identity.commit,
            sample_blake3=sample,
            files=list(identity.files),
        ),
        "files": [
            SideFile(name=name, size=len(data), blake3=blake3(data).hexdigest())
            for name, data in sorted(checkpoint.side_files.items())
        ],
    }
