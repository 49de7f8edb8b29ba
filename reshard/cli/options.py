"""What several commands take, each option said once."""

from typing import Annotated, Literal

import typer

from reshard import convert

ADDRESS = "A folder, ORG/NAME on the hub, or an address such as s3://BUCKET/PATH."

Format = Annotated[
    Literal["human", "json"], typer.Option("--format", help="What stdout carries: text, or one JSON document.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub repository; without it, main.")
]
Index = Annotated[
    str | None,
    typer.Option("--index", metavar="FILE", help="Where the weights are, if a folder has two accounts of it."),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="What the quantized weights are, where nothing beside the files says it: w8a8_dynamic, …"
    ),
]
Weights = Annotated[convert.Weights, typer.Option(help="Convert the weights; split needs torch for it.")]
Pad = Annotated[bool, typer.Option("--pad", help="Add zero rows and columns where sizes do not divide.")]


def parse_sizes(text: str | None, option: str = "--tp ") -> tuple[int, ...]:
    """What `--tp 4,8` lists, each size once. Raises UsageError for anything else."""
    from reshard.errors import UsageError
    from reshard.model.naming import MAX_TP_SIZE

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        digits = part.isascii() and part.isdigit() and len(part) <= len(str(MAX_TP_SIZE))
        if not digits or not 1 <= int(part) <= MAX_TP_SIZE:
            raise UsageError(
                f"{option}{text}: {part!r} is no group size; write them as 4,8, each from 1 to {MAX_TP_SIZE}"
            )
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_list(text: str, option: str) -> list[str]:
    """Words between commas, each once. Raises UsageError where one is left out."""
    from reshard.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if "" in words:
        raise UsageError(f"{option} {text!r}: expected a list with commas, with nothing left out")
    return list(dict.fromkeys(words))
