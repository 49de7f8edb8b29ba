"""`reshard synth`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reshard.cli.options import Debug, Format, Quiet
from reshard.cli.output import Output, size_text

if TYPE_CHECKING:
    from fractions import Fraction


def synth(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A Hugging Face config.json.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The checkpoint's folder: new or empty.")],
    scheme: Annotated[
        str, typer.Option(help="How its linears are quantized; an unknown one lists those there are.")
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
    """Make a synthetic checkpoint of a model's shape."""
    output = Output(form, quiet=quiet, debug=debug)
    with output.errors():
        from reshard.checkpoint.config_only import read_config
        from reshard.source.address import parse_local_target
        from reshard.synth.plan import SynthOptions, plan_checkpoint
        from reshard.synth.write import write_checkpoint

        folder = parse_local_target(out, "synth")
        options = SynthOptions(scheme, _fraction(scale), layers, shards, sparse, dense_only, seed)
        plan = plan_checkpoint(read_config(config), options)
        with output.progress("synth", plan.size) as tick:
            result = write_checkpoint(plan, folder, tick)
        line = (
            f"{folder}: {scheme}, {result.tensors:,} tensors of {size_text(result.tensor_bytes)} in {result.files} "
            f"{'file' if result.files == 1 else 'files'}{', a hole that takes no disk' if sparse else ''}"
        )
        output.document({"out": str(folder), "scheme": scheme, **vars(result)}, lambda: [line])


def _fraction(text: str) -> "Fraction":
    from fractions import Fraction

    from reshard.errors import UsageError

    try:
        # 1e-999999999 would be a number of as many digits.
        scale = Fraction(text) if re.fullmatch(r"[0-9./]{1,20}(e-[0-9])?", text, re.IGNORECASE) else Fraction(0)
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise UsageError(f"--scale {text}: expected a fraction above 0 and up to 1, such as 1/16")
    return scale
