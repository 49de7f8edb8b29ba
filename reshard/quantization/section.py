"""A quantization_config as config.json has it: its values, and how to speak of them."""

import re
import reprlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from reshard import limits
from reshard.errors import SourceError

_SIZES = re.compile(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}")


_T = TypeVar("_T")


@dataclass(frozen=True)
class Section:
    """`values` stand in `file`, under `path` (such as text_config.quantization_config; empty: the file itself).

    spent: the time that its lists took so far, in seconds of a processor.
    """

    file: str
    path: str
    values: Mapping[str, Any]
    spent: list[float] = field(default_factory=lambda: [0.0], compare=False, repr=False)

    def below(self, key: str, values: Mapping[str, Any]) -> "Section":
        """A section within, or one in its place where the key is empty."""
        return Section(self.file, self.at(key) if key else self.path, values, self.spent)

    def timed(self, entries: Iterable[_T]) -> Iterator[_T]:
        """Entries that are compared with a name. Raises SourceError where all those so far took too long."""
        before, started = self.spent[0], time.thread_time()
        for entry in entries:
            yield entry
            self.spent[0] = before + time.thread_time() - started
            if self.spent[0] > limits.MATCHING_SECONDS:
                raise SourceError(
                    f"{self.file}: {self.path}: its lists of names and patterns take longer than "
                    f"{limits.MATCHING_SECONDS} s; make them shorter"
                )

    def at(self, key: str) -> str:
        """A key's place in the file."""
        return f"{self.path}.{key}" if self.path else key

    def says(self, what: str) -> str:
        """Who says a thing: the file, the level where it is not the top, and by what."""
        wrapper = self.path.rpartition(".")[0]
        return f"{self.file} ({wrapper}: {what})" if wrapper else f"{self.file} ({what})"

    def error(self, key: str, problem: str) -> SourceError:
        """For a value that makes no sense."""
        return SourceError(f"{self.file}: {self.at(key)} {problem}")

    def names(self, key: str) -> list[str]:
        """A list of names, empty where the key is absent or null. Raises SourceError for anything else."""
        names = self.values.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise self.error(key, "is not a list of names")
        return names or []

    def objects(self, key: str) -> Mapping[str, Any]:
        """An object, empty where the key is absent or null. Raises SourceError for anything else."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "is not an object")
        return value or {}

    def block(self, key: str) -> tuple[int, int]:
        """Two block sizes, a list or text such as 128x128 (compressed-tensors reads both). Raises SourceError."""
        sizes = given = self.values.get(key)
        if isinstance(given, str) and _SIZES.fullmatch(given):
            sizes = [int(size) for size in given.split("x")]
        if not (
            isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and 0 < n <= limits.SIZE for n in sizes)
        ):
            raise self.error(key, f"is {reprlib.repr(given)}, expected two block sizes")
        return sizes[0], sizes[1]
