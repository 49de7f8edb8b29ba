"""`reshard verify`."""

from typing import TYPE_CHECKING, Annotated

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Quiet, Revision, Scheme
from reshard.cli.output import Output, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reshard.verification.compute import LayerResult

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
        from reshard.source.address import shown

        done = api.verify(
            shards,
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
        nbytes = sum(shard.size for shard in held)
        if output.is_json:
            output.json(
                {
                    "ok": done.ok,
                    "shards": len(held),
                    "bytes": nbytes,
                    "against_source": done.against_source,
                    "layers": [vars(layer) for layer in done.layers],
                    "findings": [vars(finding) for finding in done.findings],
                    "notes": [vars(note) for note in done.notes],
                }
            )
        elif done.ok:
            tensors = sum(len(shard.tensors) for shard in held)
            output.text(f"digests: {len(held)} shards, {tensors} tensors, {size_text(nbytes)}: as written")
            if source is not None:
                output.text(f"source: every byte is {shown(source)}'s")
                output.text(f"computation: {_computation(done.layers)}")
        else:
            for finding in done.findings:
                output.text(f"{finding.check}: {finding.where}: {finding.message}")
            output.text(f"{len(done.findings)} differences")
        if not done.ok:
            raise typer.Exit(_MISMATCH)


def _computation(computed: "Sequence[LayerResult]") -> str:
    """A line on layers that are right."""
    if not computed:
        return "not made"
    worst = max(computed, key=lambda layer: layer.difference)
    return (
        f"{len(computed)} layers on random tokens, split against unsplit: they differ by {worst.difference:.1e} of "
        f"what is added up, rounding allows {worst.bound:.1e}"
    )
