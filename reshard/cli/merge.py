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
        from reshard import api
        from reshard.writer.merge import INDEX

        done = api.merge(shards, out, warn=output.warn, progress=output.progress)
        if output.is_json:
            output.json({"out": str(done.out), "index": INDEX, "files": [vars(file) for file in done.files]})
            return
        output.table(
            ("file", ">tensors", ">size", "blake3"),
            [[f.name, str(f.tensors), size_text(f.size), f.blake3[:16]] for f in done.files],
        )
        output.text()
        output.text(f"{done.out / INDEX} completes the checkpoint")
