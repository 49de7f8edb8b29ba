"""`reshard inspect`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Revision, Scheme
from reshard.cli.output import Output, size_text

if TYPE_CHECKING:
    from reshard.checkpoint.description import Checkpoint, Linear, Tensor
    from reshard.source.base import Source


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"A checkpoint or a shard set. {ADDRESS}")],
    scheme: Scheme = None,
    revision: Revision = None,
    index: Index = None,
    form: Format = "human",
    debug: Debug = False,
) -> None:
    """Show the dense layers of a checkpoint or a shard set.

    Schemes, shapes and bytes of their tensors, and where each one lies.
    """
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.source.open import describe, open_source
        from reshard.source.shardset import is_shard_set

        with open_source(path, revision, index=index, notify=output.warn) as source:
            checkpoint = describe(source, scheme)
            for line in checkpoint.warnings:
                output.warn(line)
            shard_set = _shard_set(source) if is_shard_set(source) else None
            source.check_unchanged()
        document = _document(checkpoint) | ({"shard_set": shard_set} if shard_set else {})
        if output.is_json:
            output.json(document)
        else:
            _show(output, document)


def _shard_set(source: "Source") -> dict[str, Any]:
    from reshard.source.shardset import read_manifest

    manifest = read_manifest(source)
    return {
        "tp_size": manifest.tp_size,
        "layout": manifest.layout,
        "padding": manifest.padding.model_dump(by_alias=True) if manifest.padding else None,
        "generator": manifest.generator.model_dump(),
        "shards": [{"tp_rank": s.tp_rank, "file": s.file, "size": s.size, "blake3": s.blake3} for s in manifest.shards],
    }


def _document(checkpoint: "Checkpoint") -> dict[str, Any]:
    from reshard.model.naming import ROLES
    from reshard.plan.manifest_builder import scheme_name

    model, identity = checkpoint.model, checkpoint.identity
    return {
        "source": {"kind": identity.kind, "name": identity.name, "commit": identity.commit},
        "model": model.model_dump(),
        "scheme": scheme_name(checkpoint.layers),
        "dense_bytes": checkpoint.nbytes,
        "total_bytes": checkpoint.total_bytes,
        "total_tensors": checkpoint.total_tensors,
        "layers": [
            {
                "index": layer.index,
                "activation": vars(layer.activation) if layer.activation else None,
                "linears": {
                    role: {
                        "scheme": layer.linears[role].variant.scheme,
                        "block": layer.linears[role].block,
                        "tensors": [_tensor(t) for t in _in_table_order(layer.linears[role])],
                    }
                    for role in ROLES
                },
            }
            for layer in checkpoint.layers
        ],
    }


def _in_table_order(linear: "Linear") -> list["Tensor"]:
    return [linear.tensors[rule.suffix] for rule in linear.variant.tensors]


def _tensor(tensor: "Tensor") -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "parts": [{"file": part.file, "offset": part.offset} for part in tensor.extents],
    }


def _activation(document: dict[str, Any] | None) -> str:
    from reshard.model.activation import Activation

    return str(Activation(**document)) if document else "not known"


def _show(output: Output, document: dict[str, Any]) -> None:
    rows = []
    for layer in document["layers"]:
        for linear in layer["linears"].values():
            for tensor in linear["tensors"]:
                first, more = tensor["parts"][0], len(tensor["parts"]) - 1
                where = f"{first['file']} @ {first['offset']}" + (f" and {more} more" if more else "")
                shape = str(tensor["shape"])
                rows.append(
                    [tensor["name"], linear["scheme"], tensor["dtype"], shape, size_text(tensor["bytes"]), where]
                )
    output.table(("tensor", "scheme", "dtype", "shape", ">size", "where"), rows)
    output.text()
    model, shard_set = document["model"], document.get("shard_set")
    dense = size_text(document["dense_bytes"])
    layers = ", ".join(str(layer["index"]) for layer in document["layers"])
    activations = dict.fromkeys(_activation(layer["activation"]) for layer in document["layers"])
    output.text(
        f"{document['source']['name']}: {model['model_type'] or 'model'}, hidden_size {model['hidden_size']}, "
        f"intermediate_size {model['intermediate_size']}, dense layers {layers}, activation {', '.join(activations)}"
    )
    if shard_set:
        output.text(
            f"shard set: tp_size {shard_set['tp_size']}, {shard_set['layout']} layout, {dense} of {document['scheme']}"
        )
    else:
        output.text(
            f"DenseFFN: {dense} of {document['scheme']}; the whole checkpoint: {document['total_tensors']:,} tensors, "
            f"{size_text(document['total_bytes'])}"
        )
