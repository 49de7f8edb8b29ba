"""Names of feed-forward layers that are not cut: what they are, and what would be."""

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from reshard.model.naming import stands_beside

_NEAR = re.compile(r"mlp|ffn|feed_?forward|mixer", re.IGNORECASE)


@cache
def _known() -> dict[str, str]:
    """What a name is, by a pattern of it."""
    table = tomllib.loads((files(__package__) / "foreign_names.toml").read_text(encoding="utf-8"))
    return {pattern: " ".join(what.split()) for pattern, what in table.items()}


def what_is(name: str) -> str | None:
    """What a tensor of such a name is, and what would be cut; None for a name that is not known."""
    return next((what for pattern, what in _known().items() if re.search(pattern, name)), None)


def what_is_there(names: Iterable[str]) -> str:
    """To be added to a line that says that there is no dense layer: the nearest name, and what it is.

    Names of towers and drafts count only where there are no others.
    """
    names = sorted(names)
    names = [name for name in names if not stands_beside(_above(name))] or names
    found: dict[str, str] = {}
    for name in names:
        if (what := what_is(name)) is not None:
            found.setdefault(what, name)
    for what in _known().values():
        if what in found:
            return f"; the nearest is {found[what]}: {what}"
    near = next((name for name in names if _NEAR.search(name)), None)
    return f"; the nearest is {near}" if near else ""


def _above(name: str) -> str:
    """What precedes a name's first number."""
    return re.split(r"\.\d", name, maxsplit=1)[0] + "."
