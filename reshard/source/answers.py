"""What the head of an answer to a range says, compared with what was asked for: by HTTP, whichever client asks."""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from reshard import limits
from reshard.errors import SourceError
from reshard.source.base import Origin
from reshard.source.retry import Fault

Headers = Mapping[str, str]
"""By their names in small letters."""

_LINKED_ETAG = "x-linked-etag"  # of the file, at a hub's redirect; the store behind it has ETags of its own
_STATES = (("etag", "ETag"), ("last-modified", "date"))
# Who says how long to wait, the first that does: the hub's own, with r requests left and t seconds to the next ones.
_WAITS = (
    ("ratelimit", re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)')),
    ("retry-after", re.compile(r"([0-9]+)\s*$")),
)


@dataclass(frozen=True)
class Head:
    """Of an answer; redirects: the headers of those before it."""

    status: int
    headers: Headers
    redirects: Sequence[Headers] = ()

    def encoding(self) -> str | None:
        """What is wrong with it: only a file's own bytes are counted in ranges, and bounded by them."""
        encoding = self.headers.get("content-encoding") or "identity"
        return f"the answer is encoded as {encoding}, identity was asked for" if encoding != "identity" else None

    def not_the_range(self, start: int, stop: int, size: int) -> str | None:
        """What is wrong with it as the bytes [start, stop) of a file of that size."""
        if wrong := self.encoding():
            return wrong
        expected, got = f"bytes {start}-{stop - 1}/{size}", self.headers.get("content-range")
        if self.status == HTTPStatus.OK:
            if start > 0:
                return f"the server answers the range {start} to {stop} with the whole file"
            stop = size
        if self.status == HTTPStatus.PARTIAL_CONTENT and got != expected:
            return f"the server answers with {got or 'no Content-Range'}, expected {expected}"
        if (length := self.headers.get("content-length")) not in (None, str(stop - start)):
            return f"the answer has {length} bytes, expected {stop - start}"
        return None

    def state(self) -> str:
        """What is another when the file is."""
        linked = (("ETag", headers.get(_LINKED_ETAG)) for headers in self.redirects)
        own = ((shown, self.headers.get(name)) for name, shown in _STATES)
        return next((f"{shown} {value.removeprefix('W/')}" for shown, value in (*linked, *own) if value), "no ETag")

    def retry_after(self) -> float | None:
        """Seconds that a busy server asks for, as a number or a date; None where it says neither."""
        for name, pattern in _WAITS:
            if match := pattern.match(self.headers.get(name, "")):
                return float(match[1][:12])  # years are too long, however many
        try:
            return max(0.0, parsedate_to_datetime(self.headers.get("retry-after", "")).timestamp() - time.time())
        except (ValueError, TypeError, IndexError, OverflowError):
            return None


class RangedFiles:
    """A listing of files of which ranges are asked for by HTTP: of reshard.source.range_cache.Remote's parts these."""

    folders: Collection[str] = ()

    def __init__(self, origin: Origin, sizes: Mapping[str, int]) -> None:
        self.origin, self.sizes = origin, sizes
        self._states: dict[str, str] = {}

    def check(self, file: str, head: Head) -> None:
        """Raises SourceError where an answer is not of this file as it was when it was first asked for."""
        if (first := self._states.setdefault(file, now := head.state())) != now:
            raise SourceError(
                f"{self.origin.name}: {file}: has changed since it was first read (it had {first}, it has {now}); "
                "start again"
            )

    def taken(self, file: str, head: Head, body: Iterable[bytes], start: int, stop: int) -> Iterator[bytes]:
        """An answer's bytes, if they are what was asked for. Raises Fault, SourceError."""
        if wrong := head.not_the_range(start, stop, self.sizes[file]):
            raise Fault(wrong, tries=limits.WRONG_TRIES)
        self.check(file, head)
        if head.status == HTTPStatus.PARTIAL_CONTENT:
            yield from body
            return
        for piece in body:  # the whole file, whose beginning was asked for
            yield piece[: stop - start]
            start += len(piece)
            if start >= stop:
                return
