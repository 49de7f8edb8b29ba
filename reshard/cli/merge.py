"""`reshard merge`."""

from typing import Annotated

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Quiet
from reshard.cli.output import Output, size_text


def merge(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help=f"A shard set. {ADDRESS}")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The merged checkpoint's folder: new or empty.")],
    form: Format = "human",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put a shard set together again, bit for bit.

    The result has the Hugging Face names and shapes, and an index.
    """
    output = Output(form, quiet=quiet, debug=debug)
    with output.errors():
        from reshard.plan.pipeline import check_set_digests
        from reshard.source.address import parse_local_target
        from reshard.source.open import open_source
        from reshard.source.shardset import read_shard_set, require_shard_set
        from reshard.writer.merge import INDEX
        from reshard.writer.merge import merge as merge_set
        from reshard.writer.split import DEFAULT_WORKERS

        folder = parse_local_target(out, "merge")
        with open_source(shards, notify=output.warn) as source:
            require_shard_set(source)
            checkpoint = read_shard_set(source)
            check_set_digests(source, DEFAULT_WORKERS)
            with output.progress("merge", checkpoint.nbytes) as tick:
                files = merge_set(source, checkpoint, folder, tick)
        if output.is_json:
            output.json({"out": str(folder), "index": INDEX, "files": [vars(file) for file in files]})
            return
        output.table(
            [("file", "left"), ("tensors", "right"), ("size", "right"), ("blake3", "left")],
            [[f.name, str(f.tensors), size_text(f.size), f.blake3[:16]] for f in files],
        )
        output.text()
        output.text(f"{folder / INDEX} completes the checkpoint")
