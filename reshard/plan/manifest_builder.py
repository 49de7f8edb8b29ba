"""From a checkpoint, its plan and the writer's digests to manifest entries."""

from collections.abc import Iterable, Sequence
from typing import Any

from blake3 import blake3

from reshard import __version__
from reshard.checkpoint.description import Checkpoint, Layer, Linear
from reshard.manifest import (
    SCHEMA,
    Block,
    Conversion,
    Generator,
    LayerActivation,
    LayerSchemes,
    Manifest,
    ModelDims,
    Padding,
    Shard,
    ShardTensor,
    SideFile,
    Slice,
    Source,
    SourceFile,
)
from reshard.model.activation import Activation
from reshard.model.naming import DOWN, GATE
from reshard.plan.plan import Plan, PlannedShard, PlannedTensor
from reshard.schemes import summary


def make_manifest(checkpoint: Checkpoint, plan: Plan, sample: str, shards: Sequence[Shard]) -> Manifest:
    """The manifest of a set whose shards are all there, by rank. sample: see Prepared."""
    return Manifest(shards=list(shards), **_frame(checkpoint, plan, sample))


def make_shard(planned: PlannedShard, size: int, digest: str, digests: Iterable[str]) -> Shard:
    """A shard's entry: the file's digest, and its tensors' in file order."""
    tensors = [
        ShardTensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=list(tensor.shape),
            blake3=tensor_digest,
            slices=[
                Slice(tensor=s.tensor, shape=list(s.shape), dim=s.dim, start=s.start, stop=s.stop, at=s.at)
                for s in tensor.slices
            ],
            same_as=list(tensor.same_as),
            conversion=_conversion(tensor),
        )
        for tensor, tensor_digest in zip(planned.tensors, digests, strict=True)
    ]
    return Shard(tp_rank=planned.tp_rank, file=planned.file, size=size, blake3=digest, tensors=tensors)


def _conversion(tensor: PlannedTensor) -> Conversion | None:
    made = tensor.conversion
    return Conversion(rule=made.rule, inputs=list(made.inputs)) if made else None


def scheme_name(layers: Iterable[Layer]) -> str:
    """One word for a checkpoint, see reshard.schemes.summary."""
    return summary({linear.variant.scheme for layer in layers for linear in layer.linears.values()})


def layer_schemes(layers: Iterable[Layer]) -> list[LayerSchemes]:
    """What the manifest says of each layer."""
    return [
        LayerSchemes(
            index=layer.index,
            activation=_activation(layer.activation),
            gate_up_proj=layer.linears[GATE].variant.scheme,
            down_proj=layer.linears[DOWN].variant.scheme,
            gate_up_block=_block(layer.linears[GATE]),
            down_block=_block(layer.linears[DOWN]),
        )
        for layer in layers
    ]


def fingerprint(checkpoint: Checkpoint, plan: Plan, sample: str) -> str:
    """What the shards of one set share: all of the manifest but the shards."""
    frame = Manifest.model_construct(shards=[], **_frame(checkpoint, plan, sample))
    return blake3(frame.to_json()).hexdigest()


def _frame(checkpoint: Checkpoint, plan: Plan, sample: str) -> dict[str, Any]:
    """Every field of the manifest but the shards."""
    model, identity = checkpoint.model, checkpoint.identity
    return {
        "schema_": SCHEMA,
        "generator": Generator(name="reshard", version=__version__),
        "model": ModelDims(
            model_type=model.model_type,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            prefix=model.prefix,
        ),
        "scheme": scheme_name(checkpoint.layers),
        "tp_size": plan.tp_size,
        "layout": plan.layout,
        "padding": plan.padding
        and Padding(padded_intermediate_size=plan.padding.padded_intermediate_size, multiple=plan.padding.multiple),
        "layers": layer_schemes(checkpoint.layers),
        "source": Source(
            kind=identity.kind,
            name=identity.name,
            commit=identity.commit,
            sample_blake3=sample,
            files=[SourceFile(name=f.name, size=f.size, header_blake3=f.header_digest) for f in identity.files],
        ),
        "files": [
            SideFile(name=name, size=len(data), blake3=blake3(data).hexdigest())
            for name, data in sorted(checkpoint.side_files.items())
        ],
    }


def _activation(activation: Activation | None) -> LayerActivation | None:
    return LayerActivation(name=activation.name, limit=activation.limit) if activation else None


def _block(linear: Linear) -> Block | None:
    if linear.block is None or not linear.variant.in_blocks:
        return None
    return Block(rows=linear.block[0], columns=linear.block[1])
