"""`reshard merge`."""

from typing import Annotated

import typer

from reshard.cli.options import ADDRESS, Debug, Format, Quiet
from reshard.cli.output import Output, Table, size_text


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
        table = Table(
            ("file", ">tensors", ">size", "blake3"),
            [[f.name, str(f.tensors), size_text(f.size), f.blake3[:16]] for f in done.files],
        )
        output.document(
            {"out": str(done.out), "index": INDEX, "files": done.files},
            lambda: [table, "", f"wrote {done.out / INDEX}: the checkpoint is complete"],
        )
