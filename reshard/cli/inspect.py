"""`reshard inspect`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Revision, Scheme
from reshard.cli.output import Output, Table, size_text
from reshard.cli.parts import OnePart, parse_part

if TYPE_CHECKING:
    from reshard.checkpoint.description import Checkpoint, Tensor
    from reshard.source.base import Source


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help=f"A checkpoint or a shard set. {ADDRESS}")],
    part: OnePart = None,
    scheme: Scheme = None,
    revision: Revision = None,
    index: Index = None,
    form: Format = "human",
    debug: Debug = False,
) -> None:
    """Show a checkpoint's dense layers, another part, or a set.

    Schemes, shapes and bytes of their tensors, and where each one lies.
    """
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.source.open import describe, open_part
        from reshard.source.shardset import is_shard_set

        what = parse_part(part)
        with open_part(path, what, revision, index=index, notify=output.warn)[1] as source:
            checkpoint = describe(source, scheme, what)
            for line in checkpoint.warnings:
                output.warn(line)
            shard_set = _shard_set(source) if is_shard_set(source) else None
            source.check_unchanged()
        document = _document(checkpoint) | ({"shard_set": shard_set} if shard_set else {})
        output.document(document, lambda: _lines(document))


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
    from reshard.plan.manifest_builder import scheme_name

    model, identity = checkpoint.model, checkpoint.identity
    return {
        "source": {"kind": identity.kind, "name": identity.name, "commit": identity.commit},
        "part": checkpoint.part.key,
        "model": model.model_dump(),
        "scheme": scheme_name(checkpoint.layers),
        "part_bytes": checkpoint.nbytes,
        "total_bytes": checkpoint.total_bytes,
        "total_tensors": checkpoint.total_tensors,
        "layers": [
            {
                "index": layer.index,
                "activation": layer.activation,
                "linears": {
                    role: {
                        "scheme": linear.variant.scheme,
                        "block": linear.block,
                        "tensors": [_tensor(linear.tensors[rule.suffix]) for rule in linear.variant.tensors],
                    }
                    for role, linear in layer.linears.items()
                },
            }
            for layer in checkpoint.layers
        ],
    }


def _tensor(tensor: "Tensor") -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "parts": [{"file": part.file, "offset": part.offset} for part in tensor.extents],
    }


def _lines(document: dict[str, Any]) -> Iterator[str | Table]:
    rows = []
    for layer in document["layers"]:
        for linear in layer["linears"].values():
            for tensor in linear["tensors"]:
                first, more = tensor["parts"][0], len(tensor["parts"]) - 1
                where = f"{first['file']} @ {first['offset']}" + (f" and {more} more" if more else "")
                size = size_text(tensor["bytes"])
                rows.append([tensor["name"], linear["scheme"], tensor["dtype"], str(tensor["shape"]), size, where])
    yield Table(("tensor", "scheme", "dtype", "shape", ">size", "where"), rows)
    yield ""
    model, shard_set = document["model"], document.get("shard_set")
    from reshard.model.parts import DENSE_FFN, PARTS

    part = PARTS[document["part"]]
    sizes = ", ".join(f"{name} {model[name]}" for name in part.sizes)
    layers = ", ".join(str(layer["index"]) for layer in document["layers"])
    where = f"layers {layers}" if part.place.in_layers else part.name
    if part is DENSE_FFN:
        activations = ", ".join(dict.fromkeys(str(layer["activation"] or "not known") for layer in document["layers"]))
        where = f"dense layers {layers}, activation {activations}"
    yield f"{document['source']['name']}: {model['model_type'] or 'model'}, {sizes}, {where}"
    held = f"{size_text(document['part_bytes'])} of {document['scheme']}"
    if shard_set:
        yield f"shard set: tp_size {shard_set['tp_size']}, {shard_set['layout']} layout, {held}"
    else:
        whole = f"{document['total_tensors']:,} tensors, {size_text(document['total_bytes'])}"
        yield f"{part.name}: {held}; the whole checkpoint: {whole}"
