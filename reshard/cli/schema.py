"""`reshard schema`."""

from reshard.cli.options import Debug, Format
from reshard.cli.output import Output


def schema(form: Format = "human", debug: Debug = False) -> None:
    """Print the manifest's JSON Schema."""
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.manifest import json_schema

        output.escaped(json_schema().rstrip("\n"))
