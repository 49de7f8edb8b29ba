"""Files over HTTP, at hubs and on plain servers: each answer is compared with what was asked for, none is read whole.

What is asked for never comes compressed: a range is one of the file's own bytes, and its length bounds the answer's.
"""

import abc
import collections
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from reshard import limits
from reshard.errors import SourceError
from reshard.safe_text import one_line
from reshard.source.base import Origin
from reshard.source.retry import MAY_PASS, Fault
from reshard.source.watched import watched

try:
    from huggingface_hub.utils import httpx as httpx  # the one that its client is of: httpx2, or httpx
except ImportError:  # none, or an older one
    import httpx  # type: ignore[no-redef]

_LINKED_ETAG = "X-Linked-Etag"  # of the file, at a hub's redirect; the store behind it has ETags of its own
_STATES = ("ETag", "Last-Modified")
# Who says how long to wait, the first that does: the hub's own, with r requests left and t seconds to the next ones.
_WAITS = (
    ("RateLimit", re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]+)')),
    ("Retry-After", re.compile(r"([0-9]+)\s*$")),
)


class Unreachable(Fault):
    """Nobody answers at that address."""


@dataclass(frozen=True)
class Request:
    """What to ask whom: of `url` everything, or a range."""

    client: httpx.Client
    url: str
    headers: Mapping[str, str]
    patience: float


@contextlib.contextmanager
def asked(request: Request, start: int | None = None, stop: int | None = None) -> Iterator[httpx.Response]:
    """The head of an answer; its body comes with `iter_raw`. Raises Fault, SourceError."""
    headers = {**request.headers, "accept-encoding": "identity"}
    if start is not None and stop is not None:
        headers["range"] = f"bytes={start}-{stop - 1}"
    try:
        first = request.client.build_request("GET", request.url, headers=headers, timeout=request.patience)
        with contextlib.closing(_followed(request.client, first)) as response:
            yield response
    except httpx.ConnectError as error:
        raise Unreachable(said(error)) from None
    except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL, UnicodeError) as error:
        raise SourceError(f"{_where(request)}: {said(error)}") from None
    except httpx.HTTPError as error:
        raise Fault(said(error)) from None


def _followed(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    """The answer at the end of redirects. httpx would read each redirect's body, whatever its length."""
    history: list[httpx.Response] = []
    while True:
        response = client.send(request, stream=True, follow_redirects=False)
        if response.next_request is None:
            response.history = history
            return response
        with contextlib.closing(response):
            # To the end of a short one, after which the connection serves the next request.
            collections.deque(itertools.islice(response.iter_raw(), 2), maxlen=0)
        if len(history) == client.max_redirects:
            raise httpx.TooManyRedirects("too many redirects", request=request)
        history.append(response)
        request = response.next_request


def read_small(request: Request, check: Callable[[httpx.Response], None], most: int) -> bytes:
    """A whole answer. check: raises what an answer with another status than 200 means."""
    where = _where(request)

    def chunks() -> Iterator[bytes]:
        with asked(request) as response:
            check(response)
            if wrong := _encoded(response):
                raise SourceError(f"{where}: {wrong}")
            yield from response.iter_raw()

    body = bytearray()
    for chunk in watched(chunks, request.patience):
        body += chunk
        if len(body) > most:
            raise SourceError(f"{where}: the answer is longer than {most} bytes, the most that is read")
    return bytes(body)


def _where(request: Request) -> str:
    return request.url.partition("?")[0]


class HttpFiles(abc.ABC):
    """A listing of files at a server: reshard.source.range_cache.Remote."""

    origin: Origin
    sizes: Mapping[str, int]

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._states: dict[str, str] = {}

    @abc.abstractmethod
    def request(self, file: str) -> Request:
        """How a file is asked for."""

    @abc.abstractmethod
    def refusal(self, response: httpx.Response, file: str) -> Fault | SourceError:
        """What an answer means that is no file."""

    def check(self, response: httpx.Response, file: str) -> None:
        """Raises SourceError where an answer is not of this file as it was when it was first asked for."""
        if (first := self._states.setdefault(file, now := _state(response))) != now:
            raise SourceError(
                f"{self.origin.name}: {file}: has changed since it was first read (it had {first}, it has {now}); "
                "start again"
            )

    def seconds(self, size: int) -> float:
        """See Remote: what comes is seen as it comes."""
        return self.patience

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) as they come."""
        with asked(self.request(file), start, stop) as response:
            if response.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                raise self.refusal(response, file)
            if wrong := _not_the_range(response, start, stop, self.sizes[file]):
                raise Fault(wrong, tries=limits.WRONG_TRIES)
            self.check(response, file)
            if response.status_code == HTTPStatus.PARTIAL_CONTENT:
                yield from response.iter_raw()
                return
            for chunk in response.iter_raw():  # the whole file, whose beginning was asked for
                yield chunk[: stop - start]
                start += len(chunk)
                if start >= stop:
                    return


def _state(response: httpx.Response) -> str:
    """What is another when the file is."""
    linked = (("ETag", step.headers.get(_LINKED_ETAG)) for step in response.history)
    own = ((name, response.headers.get(name)) for name in _STATES)
    return next((f"{name} {value.removeprefix('W/')}" for name, value in (*linked, *own) if value), "no ETag")


def _not_the_range(response: httpx.Response, start: int, stop: int, size: int) -> str | None:
    """What is wrong with an answer, by its head."""
    if wrong := _encoded(response):
        return wrong
    expected, got = f"bytes {start}-{stop - 1}/{size}", response.headers.get("Content-Range")
    if response.status_code == HTTPStatus.OK:
        if start > 0:
            return f"the server answers the range {start} to {stop} with the whole file"
        stop = size
    if response.status_code == HTTPStatus.PARTIAL_CONTENT and got != expected:
        return f"the server answers with {got or 'no Content-Range'}, expected {expected}"
    if (length := response.headers.get("Content-Length")) not in (None, str(stop - start)):
        return f"the answer has {length} bytes, expected {stop - start}"
    return None


def _encoded(response: httpx.Response) -> str | None:
    encoding = response.headers.get("Content-Encoding", "identity")
    return f"the answer is encoded as {encoding}, identity was asked for" if encoding != "identity" else None


def busy(response: httpx.Response) -> Fault | None:
    """For an answer after which it is worth asking again."""
    if response.status_code not in MAY_PASS:
        return None
    return Fault(f"HTTP {response.status_code} {response.reason_phrase}".rstrip(), _retry_after(response.headers))


def said(error: Exception) -> str:
    """What a library says went wrong, in one line; some say nothing."""
    return one_line(error) or type(error).__name__


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a busy server asks for, as a number or a date; None where it says neither."""
    for name, pattern in _WAITS:
        if match := pattern.match(headers.get(name, "")):
            return float(match[1][:12])  # years are too long, however many
    try:
        return max(0.0, parsedate_to_datetime(headers.get("Retry-After", "")).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
