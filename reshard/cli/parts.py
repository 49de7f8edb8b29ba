"""`--part`: what of a model a command is about."""

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from reshard.model.parts import Part

_NAMES = "denseffn, lm_head, embedding or o_proj"

OnePart = Annotated[
    str | None, typer.Option("--part", metavar="NAME", help=f"{_NAMES}: what of a checkpoint; a set says its own.")
]
Parts = Annotated[
    list[str] | None,
    typer.Option(
        "--part", metavar="NAME[=TP]", help=f"{_NAMES}; of several, each goes into a folder of its name in OUT."
    ),
]
PartsOfSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--part", metavar="NAME[=TP,..]", help=f"{_NAMES}; again for more, each with sizes of its own or those of --tp."
    ),
]


def parse_part(name: str | None) -> "Part | None":
    """Raises UsageError for a name that is no part's."""
    from reshard.model.parts import part_named

    return None if name is None else part_named(name)


def parse_parts_of_sizes(given: list[str] | None, tp: str | None) -> "list[tuple[Part | None, list[int]]]":
    """The parts that `--part` names, each with its own sizes or those of `--tp`, in order; None where it names none.

    Raises UsageError for a name that is no part's or is there twice, and where there is no size.
    """
    from reshard.cli.options import parse_sizes
    from reshard.errors import UsageError
    from reshard.model.parts import part_named

    found: dict[Part | None, list[int]] = {}
    for text in given or ():
        name, _, sizes = text.partition("=")
        part = part_named(name)
        if part in found:
            raise UsageError(f"--part {name}: is there twice")
        found[part] = sorted(parse_sizes(sizes, f"--part {name}=") if "=" in text else parse_sizes(tp))
    found = found or {None: sorted(parse_sizes(tp))}
    if not all(found.values()):
        raise UsageError("--tp is missing: give the group sizes to compare, such as --tp 1,2,4,8")
    return list(found.items())


class Sized(NamedTuple):
    """A part that is to be cut, None where no `--part` is given; the size, and the option that gives it."""

    part: "Part | None"
    size: int
    said: str


def parse_parts(given: list[str] | None, tp: int | None) -> list[Sized]:
    """The parts that `--part` names, each with its own size or that of `--tp`.

    Raises UsageError for a name that is no part's or is there twice, and where there is no size.
    """
    from reshard.errors import UsageError
    from reshard.model.naming import MAX_TP_SIZE
    from reshard.model.parts import part_named

    by_tp = f"--tp {tp}"
    found: dict[Part | None, tuple[int | None, str]] = {}
    for text in given or ():
        name, is_sized, size = text.partition("=")
        part = part_named(name)
        if part in found:
            raise UsageError(f"--part {name}: is there twice")
        digits = size.isascii() and size.isdigit() and len(size) <= len(str(MAX_TP_SIZE))
        if is_sized and not digits:
            raise UsageError(f"--part {text}: {size!r} is no group size; write it as {name}=8")
        found[part] = (int(size), f"--part {text}") if is_sized else (tp, by_tp)
    found = found or {None: (tp, by_tp)}
    sized = [Sized(part, size, said) for part, (size, said) in found.items() if size is not None]
    if len(sized) < len(found):
        lacking = next(part for part, (size, _) in found.items() if size is None)
        raise UsageError("--tp: missing" + (f", and --part {lacking.key} has no size of its own" if lacking else ""))
    return sized
