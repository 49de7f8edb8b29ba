"""What a command's messages advise: options, of its own or of the `reshard NAME` that stands before them, and sizes."""

import re
from collections.abc import Iterator
from functools import cache

import typer

from reshard.cli.main import app

_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)(?: (?![a-z]+ |to |or )([\w./=-]*\w))?")
_COMMAND = re.compile(r"\breshard ([a-z]+)\b")
_SIZES = re.compile(r"(?:use a tp of|may be|it may be) ([0-9, or]*[0-9])")


@cache
def _takes_value(command: str) -> dict[str, bool]:
    """A command's options by their long names, and whether each has a value."""
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name: not getattr(one, "is_flag", False) for one in found.params for name in one.opts}


def advised_options(command: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, option and its value) for each option that a text names."""
    for part in re.split(r"[\n;]|\\n", text):
        of, at = command, 0
        for named in [*_COMMAND.finditer(part), None]:
            for option in _OPTION.finditer(part[at : named.start() if named else len(part)]):
                has_value = _takes_value(of).get(option[1], False)
                yield of, [option[1], *([option[2]] if has_value and option[2] else [])]
            if named:
                of, at = named[1], named.end()


def foreign_options(command: str, text: str) -> list[str]:
    """Options in a text that the command which they are said of does not have."""
    return [option for of, (option, *_) in advised_options(command, text) if option not in _takes_value(of)]


def advised_sizes(text: str) -> list[int]:
    """Sizes that a text says to use."""
    return [int(size) for listed in _SIZES.findall(text) for size in re.findall("[0-9]+", listed)]
