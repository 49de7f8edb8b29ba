"""What this process reads of safetensors files, counted on every way to their bytes that Python has.

safe_open, whichever module holds it: the tensors that are asked for. `reshard.regular.Opened`: ranges. Any other
opening of such a file is told.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from reshard.regular import Opened


@dataclass(eq=False)
class Reads:
    """By files' names in full: ranges [start, stop) that were read, tensors that were asked for.

    others: files that were opened some other way.
    """

    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    asked: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def tensors(self, file: Path) -> set[str]:
        """Those of which any byte was read."""
        return {name for name, nbytes in self._bytes(file).items() if nbytes}

    def nbytes(self, file: Path) -> int:
        """Of the tensors' data: a byte that is read twice counts twice."""
        return sum(self._bytes(file).values())

    def _bytes(self, file: Path) -> dict[str, int]:
        path, where = str(file.resolve()), spans(file)
        read = [*self.ranges.get(path, []), *(where[name] for name in self.asked.get(path, []))]
        return {
            name: sum(max(0, min(end, stop) - max(first, start)) for start, stop in read)
            for name, (first, end) in where.items()
        }


def nbytes(file: Path, names: Collection[str]) -> int:
    """Of these tensors."""
    return sum(end - start for name, (start, end) in spans(file).items() if name in names)


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes are in its file."""
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    header.pop("__metadata__", None)
    return {name: (start + said["data_offsets"][0], start + said["data_offsets"][1]) for name, said in header.items()}


_counting: list[Reads] = []  # an audit hook stays for good


@contextlib.contextmanager
def counted(*folders: Path) -> Iterator[Reads]:
    """What is read, while this lasts, of the safetensors files in these folders and below."""
    reads = Reads()
    roots = [str(folder.resolve()) + os.sep for folder in folders]
    by_opened: list[str] = []

    def is_watched(path: str) -> bool:
        return path.endswith(".safetensors") and any(path.startswith(root) for root in roots)

    def note(path: str, start: int, stop: int) -> None:
        if is_watched(path):
            reads.ranges.setdefault(path, []).append((start, stop))

    def ask(path: str, name: str) -> None:
        if is_watched(path):
            reads.asked.setdefault(path, []).append(name)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and reads in _counting and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if is_watched(path) and path not in by_opened:
                reads.others.append(path)

    init, read, fill = Opened.__init__, Opened.read, Opened.fill

    def noted_init(opened: Opened, path: Path) -> None:
        by_opened.append(os.path.realpath(path))
        try:
            init(opened, path)
        finally:
            by_opened.pop()

    def noted_read(opened: Opened, start: int, stop: int) -> bytes:
        note(os.path.realpath(opened.path), start, min(stop, opened.size))
        return read(opened, start, stop)

    def noted_fill(opened: Opened, into: memoryview, start: int) -> int:
        note(os.path.realpath(opened.path), start, start + len(into))
        return fill(opened, into, start)

    sys.addaudithook(audit)
    _counting.append(reads)
    with contextlib.ExitStack() as patched:
        for name, noted in {"__init__": noted_init, "read": noted_read, "fill": noted_fill}.items():
            patched.enter_context(mock.patch.object(Opened, name, noted))
        for holder, name, safe_open in _holders():
            patched.enter_context(mock.patch.object(holder, name, _noting(safe_open, ask)))
        try:
            yield reads
        finally:
            _counting.remove(reads)


def _holders() -> Iterator[tuple[Any, str, Any]]:
    import safetensors

    safe_open = safetensors.safe_open
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is safe_open:
                yield module, name, safe_open


def _noting(safe_open: Any, ask: Callable[[str, str], None]) -> Any:
    """A class of the same use; what is not known here, it does not have."""

    class Slice:
        def __init__(self, file: "File", name: str) -> None:
            self._path, self._name, self._slice = file.path, name, file.opened.get_slice(name)
            self.get_shape, self.get_dtype = self._slice.get_shape, self._slice.get_dtype

        def __getitem__(self, index: Any) -> Any:
            ask(self._path, self._name)
            return self._slice[index]

    class File:
        def __init__(self, filename: Any, *args: Any, **more: Any) -> None:
            self.path = os.path.realpath(filename)  # a descriptor's, too
            self.opened = safe_open(filename, *args, **more)
            self.keys, self.metadata = self.opened.keys, self.opened.metadata

        def get_tensor(self, name: str) -> Any:
            ask(self.path, name)
            return self.opened.get_tensor(name)

        def get_slice(self, name: str) -> Slice:
            return Slice(self, name)

        def __enter__(self) -> "File":
            self.opened.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.__exit__(*error)

    return File
