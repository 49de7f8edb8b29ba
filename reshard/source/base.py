"""What a source offers. A folder is one; the plan and the writer know nothing of what stands behind it."""

import abc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np

from reshard.errors import HeaderError
from reshard.limits import JSON_BYTES
from reshard.regular import MISSING as MISSING
from reshard.safe_text import without_secrets
from reshard.strict_json import check_size
from reshard.tensors import header
from reshard.tensors.header import Header
from reshard.tensors.memory import Bytes
from reshard.workers import Workers

Range = tuple[str, int, int]
"""(file, its first byte, the byte behind the last)"""

_BLOCK_BYTES = 1 << 20
_HEADERS_AT_ONCE = 16  # a request to a server takes long, and its processor not at all


@dataclass(frozen=True)
class Origin:
    """What a source is called, free of hosts, paths and credentials.

    kind: the source's own word, such as `folder` (its name), `remote` (a folder's name on another file system) or `hub`
    (a repository and its commit).
    """

    kind: str
    name: str
    commit: str | None = None

    def __post_init__(self) -> None:
        # It goes into manifests, which others read: a name that is no UTF-8 is spelt out there.
        name = without_secrets(self.name).encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, "name", name)


class Source(abc.ABC):
    """Files by name, in byte ranges. Safe to use from several threads.

    origin: for the manifest. index: the file that was named as the account of the weights, an index or the one file
    that holds them all.
    """

    origin: Origin
    index: str | None = None

    @abc.abstractmethod
    def files(self) -> Mapping[str, int]:
        """Every file's name and size in bytes."""

    def folders(self) -> Collection[str]:
        """Folders within that hold weights, by their paths from here, as far as that is known."""
        return ()

    def not_files(self) -> Collection[str]:
        """Names of anything else: links to nothing, FIFOs, devices, folders. Somebody put them there."""
        return ()

    def absent(self, file: str) -> str:
        """Why a file is none of `files`: MISSING, or what stands in its place."""
        return MISSING

    @abc.abstractmethod
    def read(self, file: str, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop). Raises SourceError where they cannot be read."""

    @abc.abstractmethod
    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        """Fill `out` [rows, bytes], row i with the file's bytes from start + i * stride. Raises as `read` does.

        once: nobody reads them again, so the host's memory need not hold them.
        """

    def blocks(self, file: str, start: int, stop: int) -> Iterator[Bytes]:
        """Bytes [start, stop), step by step, in memory that the next step fills anew."""
        memory = np.empty((1, min(_BLOCK_BYTES, stop - start)), np.uint8)
        for at in range(start, stop, _BLOCK_BYTES):
            block = memory[:, : stop - at]
            self.read_rows(block, file, at, block.size)
            yield block[0]

    def prefetch(self, ranges: Iterable[Range]) -> None:  # noqa: B027 - of a disk the kernel reads ahead
        """A hint that these are wanted soon, the first ones first."""

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Those that were read, by their files."""
        return {}

    def release(self, file: str) -> None:  # noqa: B027 - nothing to release is the rule
        """A file of which nothing but the header was read need not stay open, nor be looked at by `check_unchanged`.

        When it is read again it must be the same.
        """

    def check_unchanged(self) -> None:  # noqa: B027 - a source that compares each answer with the first has nothing to do
        """After the last byte was read, and before anything that was made of them is committed.

        Raises SourceError where a file that was read is no longer the one whose first byte was read.
        """

    def cancel(self) -> None:  # noqa: B027 - a disk is not waited for
        """Make calls that wait for bytes, in whatever thread, raise Cancelled soon."""

    def close(self) -> None:  # noqa: B027
        """Let go of what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ranges in their order, those that follow on from the one before joined to it."""
    last: Range | None = None
    for file, start, stop in ranges:
        if start >= stop:
            continue
        if last and file == last[0] and last[1] <= start <= last[2]:
            last = (file, last[1], max(stop, last[2]))
            continue
        if last:
            yield last
        last = (file, start, stop)
    if last:
        yield last


def read_header(source: Source, file: str) -> Header:
    """A safetensors file's header. Raises HeaderError if it must not be trusted."""
    known, files = source.headers.get(file), source.files()
    if known is None:
        known = header.read_header(lambda start, stop: source.read(file, start, stop), file, files[file], files)
        source.headers[file] = known
    return known


def read_headers(source: Source, files: Sequence[str]) -> dict[str, Header]:
    """The headers of several safetensors files. Raises as `read_header` for the first that cannot be had."""
    found = {}
    for file, result in try_headers(source, files).items():
        if isinstance(result, HeaderError):
            raise result
        found[file] = result
    return found


def try_headers(source: Source, files: Sequence[str]) -> dict[str, Header | HeaderError]:
    """The headers of several safetensors files, or why one must not be trusted."""

    def attempt(file: str) -> Header | HeaderError:
        try:
            return read_header(source, file)
        except HeaderError as error:
            return error

    workers = Workers(max(1, min(_HEADERS_AT_ONCE, len(files))), source)
    return dict(zip(files, workers.map(attempt, files), strict=True))


def read_file(source: Source, file: str, most: int = JSON_BYTES) -> bytes:
    """A whole JSON file. Raises SourceError for a larger one than is parsed."""
    size = source.files()[file]
    check_size(size, file, most=most)
    return source.read(file, 0, size)
