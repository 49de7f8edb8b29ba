"""`reshard verify`."""

from typing import TYPE_CHECKING, Annotated

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Index, Quiet, Revision, Scheme
from reshard.cli.output import Output, size_text

if TYPE_CHECKING:
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
        from reshard.checkpoint.describe import of_activations
        from reshard.errors import UsageError
        from reshard.model.naming import CONFIG
        from reshard.source.address import shown
        from reshard.source.open import describe, open_source
        from reshard.source.shardset import read_manifest_only, require_shard_set
        from reshard.verification.compute import compare_computation
        from reshard.verification.digests import verify_digests
        from reshard.verification.source import compare_with_source
        from reshard.writer.split import DEFAULT_WORKERS

        if revision is not None and source is None:
            raise UsageError(
                f"--revision {revision}: is the source's; give --source, or SHARDS as hf://ORG/NAME@{revision}"
            )
        for option, value in (("--scheme", scheme), ("--index", index)):
            if value is not None and source is None:
                raise UsageError(f"{option} {value}: is the source's; give --source, or leave it out")
        computed: list[LayerResult] = []
        with open_source(shards, notify=output.warn) as opened:
            require_shard_set(opened)
            manifest = read_manifest_only(opened)
            nbytes = sum(shard.size for shard in manifest.shards)
            with output.progress("digests", nbytes) as tick:
                findings = verify_digests(opened, manifest, DEFAULT_WORKERS, tick)
            unreadable = any(finding.check in {"file", "size", "header"} for finding in findings)
            if source is not None and not unreadable:
                with open_source(source, revision, index=index, notify=output.warn) as original:
                    checkpoint = describe(original, scheme)
                    # compare_computation says it, too
                    left_out = {*of_activations(checkpoint.layers, config=CONFIG in checkpoint.side_files)}
                    for line in checkpoint.warnings:
                        if line not in left_out:
                            output.warn(line)
                    with output.progress("source", nbytes) as tick:
                        findings += compare_with_source(opened, manifest, original, checkpoint, tick)
                    if not any(finding.check == "names" for finding in findings):
                        with output.progress("computation", nbytes) as tick:
                            found, computed = compare_computation(opened, manifest, original, checkpoint, tick=tick)
                            findings += found
                    original.check_unchanged()
            opened.check_unchanged()
        # Bytes are what counts: the same weights in other files are no mismatch, and still worth a word.
        notes = [finding for finding in findings if finding.severity == "warning"]
        findings = [finding for finding in findings if finding.severity == "error"]
        for note in notes:
            output.warn(f"{note.where}: {note.message}")
        if output.is_json:
            output.json(
                {
                    "ok": not findings,
                    "shards": len(manifest.shards),
                    "bytes": nbytes,
                    "against_source": source is not None and not unreadable,
                    "layers": [vars(layer) for layer in computed],
                    "findings": [vars(finding) for finding in findings],
                    "notes": [vars(note) for note in notes],
                }
            )
        else:
            for finding in findings:
                output.text(f"{finding.check}: {finding.where}: {finding.message}")
            tensors = sum(len(shard.tensors) for shard in manifest.shards)
            if findings:
                output.text(f"{len(findings)} differences")
            else:
                output.text(
                    f"digests: {len(manifest.shards)} shards, {tensors} tensors, {size_text(nbytes)}: as written"
                )
                if source is not None:
                    output.text(f"source: every byte is {shown(source)}'s")
                    output.text(f"computation: {_computation(computed)}")
        if findings:
            raise typer.Exit(_MISMATCH)


def _computation(computed: "list[LayerResult]") -> str:
    """A line on layers that are right."""
    if not computed:
        return "not made"
    worst = max(computed, key=lambda layer: layer.difference)
    return (
        f"{len(computed)} layers on random tokens, split against unsplit: they differ by {worst.difference:.1e} of "
        f"what is added up, rounding allows {worst.bound:.1e}"
    )
