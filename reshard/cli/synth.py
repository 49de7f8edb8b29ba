"""`reshard synth`."""

from pathlib import Path
from typing import Annotated

import typer

from reshard.cli.output import Debug, Format, Output, Quiet, size_text


def synth(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A Hugging Face config.json.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint's folder: new or empty.")],
    scheme: Annotated[
        str, typer.Option(help="How its linears are quantised; an unknown one lists those there are.")
    ] = "bf16",
    scale: Annotated[str, typer.Option(help="Shrink the model's sizes, such as 1/16.")] = "1",
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first N layers.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Number of files.")] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Headers only; the data is a hole that takes no disk.")
    ] = False,
    dense_only: Annotated[bool, typer.Option("--dense-only", help="Only the DenseFFN's tensors.")] = False,
    seed: Annotated[int, typer.Option(help="The values' seed.")] = 0,
    form: Format = "human",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a synthetic checkpoint of a model's shape: for tests, benchmarks and trying things out."""
    output = Output(form, quiet=quiet, debug=debug)
    with output.errors():
        raise NotImplementedError(config, out, scheme, scale, layers, shards, sparse, dense_only, seed, size_text)
