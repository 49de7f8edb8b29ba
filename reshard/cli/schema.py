"""`reshard schema`."""

from reshard.cli.output import Debug, Format, Output


def schema(form: Format = "human", debug: Debug = False) -> None:
    """Print the manifest's JSON Schema."""
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard.manifest import json_schema

        output.text(json_schema().rstrip("\n"))
