"""Files that are counted in their names: which of them are missing."""

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.+-)([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")


def missing_numbers(files: Iterable[str]) -> list[str]:
    """The files that names such as model-00001-of-00003.safetensors say there are, and that are none of `files`."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file):
            sets.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    missing = []
    for (stem, count), held in sets.items():
        first, digits = (0 if 0 in held else 1), len(next(iter(held.values())))
        wanted = (number for number in range(first, first + int(count)) if number not in held)
        missing += [f"{stem}{number:0{digits}d}-of-{count}.safetensors" for number in wanted]
    return missing
