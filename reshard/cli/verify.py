"""`reshard verify`."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Quiet, Revision, Scheme
from reshard.cli.output import Output, size_text

_MISMATCH = 3


def verify(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=f"A shard set. {ADDRESS}")],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SRC", help="What it was cut from: compare every byte, and the computation."),
    ] = None,
    scheme: Scheme = None,
    revision: Revision = None,
    index: Index = None,
    form: Format = "human",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a shard set against its manifest and its source.

    With --source every byte is compared, and the split computation with the unsplit one on random tokens.
    """
    output = Output(form, quiet=quiet, debug=debug)
    with output.errors():
        from reshard import api
        from reshard.source.open import each_set

        def verified(address: str) -> tuple[dict[str, Any], int]:
            done = api.verify(
                address,
                source,
                scheme=scheme,
                revision=revision,
                index=index,
                warn=output.warn,
                progress=output.progress,
            )
            for note in done.notes:
                output.warn(f"{note.where}: {note.message}")
            held = done.manifest.shards
            document = {
                "ok": done.ok,
                "part": done.manifest.part,
                "shards": len(held),
                "bytes": sum(shard.size for shard in held),
                "against_source": done.against_source,
                "layers": done.layers,
                "findings": done.findings,
                "notes": done.notes,
            }
            return document, sum(len(shard.tensors) for shard in held)

        found = each_set(shards, verified)
        ok = all(document["ok"] for document, _ in found)
        whole = found[0][0] if len(found) == 1 else {"ok": ok, "parts": [document for document, _ in found]}
        output.document(whole, lambda: [line for each in found for line in _lines(*each, source, len(found) > 1)])
        if not ok:
            raise typer.Exit(_MISMATCH)


def _lines(document: dict[str, Any], tensors: int, source: str | None, named: bool) -> Iterator[str]:
    if named:
        yield f"{document['part']}:"
    if not document["ok"]:
        for finding in document["findings"]:
            yield f"{finding.check}: {finding.where}: {finding.message}"
        yield f"{len(document['findings'])} differences"
        return
    yield f"digests: {document['shards']} shards, {tensors} tensors, {size_text(document['bytes'])}: match the manifest"
    if source is not None:
        yield f"source: every byte matches {source}"
        layers = document["layers"]
        counted = f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"
        worst = max(layers, key=lambda layer: layer.difference, default=None)
        yield "computation: " + (
            f"{counted} on random tokens, split against unsplit: max relative error {worst.difference:.1e}, "
            f"tolerance {worst.bound:.1e}"
            if worst
            else "not made"
        )
