"""The `reshard` program."""

import gc
from typing import Annotated

import typer

from reshard import __version__
from reshard.cli.check import check
from reshard.cli.estimate import estimate
from reshard.cli.inspect import inspect
from reshard.cli.merge import merge
from reshard.cli.output import run
from reshard.cli.schema import schema
from reshard.cli.signals import end_tidily
from reshard.cli.split import split
from reshard.cli.synth import synth
from reshard.cli.verify import verify

app = typer.Typer(
    name="reshard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (split, inspect, verify, merge, check, estimate, synth, schema):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reshard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Cut the DenseFFN weights of a checkpoint into one verified safetensors shard per rank.

    Exit codes: 0 done; 1 bad input, no space, unreadable source; 2 wrong usage; 3 a check found a mismatch;
    130 interrupted.
    """


def main() -> None:
    """The console script."""
    end_tidily()
    # The 91,000 entries of R1's headers hold no cycles; looking for some takes a sixth of `inspect`.
    gc.disable()
    run(app)
