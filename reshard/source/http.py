"""Files over HTTP, at hubs and on plain servers: each answer is compared with what was asked for, none is read whole.

What is asked for never comes compressed: a range is one of the file's own bytes, and its length bounds the answer's.
"""

import abc
import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from reshard.errors import SourceError
from reshard.safe_text import one_line
from reshard.source.answers import Head, RangedFiles
from reshard.source.base import Origin
from reshard.source.retry import MAY_PASS, Fault
from reshard.source.watched import watched

try:
    from huggingface_hub.utils import httpx as httpx  # the one that its client is of: httpx2, or httpx
except ImportError:  # none, or an older one
    import httpx  # type: ignore[no-redef]


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
        if request.url.scheme == "https" and response.next_request.url.scheme == "http":
            there, other = (str(url).partition("?")[0] for url in (request.url, response.next_request.url))
            raise SourceError(
                f"{there}: redirects from https to {other}, where anybody on the way could answer; nothing was asked "
                "for there: mend the redirect, or give an http:// address if that is meant"
            )
        request = response.next_request


def read_small(request: Request, check: Callable[[httpx.Response], None], most: int) -> bytes:
    """A whole answer. check: raises what an answer with another status than 200 means."""
    where = _where(request)

    def chunks() -> Iterator[bytes]:
        with asked(request) as response:
            check(response)
            if wrong := head(response).encoding():
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


class HttpFiles(RangedFiles, abc.ABC):
    """A listing of files at a server: reshard.source.range_cache.Remote."""

    def __init__(self, origin: Origin, sizes: Mapping[str, int], patience: float) -> None:
        super().__init__(origin, sizes)
        self.patience = patience

    @abc.abstractmethod
    def request(self, file: str) -> Request:
        """How a file is asked for."""

    @abc.abstractmethod
    def refusal(self, response: httpx.Response, file: str) -> Fault | SourceError:
        """What an answer means that is no file."""

    def seconds(self, size: int) -> float:
        """See Remote: what comes is seen as it comes."""
        return self.patience

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) as they come."""
        with asked(self.request(file), start, stop) as response:
            if response.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                raise self.refusal(response, file)
            yield from self.taken(file, head(response), response.iter_raw(), start, stop)


def head(response: httpx.Response) -> Head:
    """Of the last answer, after redirects."""
    return Head(response.status_code, response.headers, [step.headers for step in response.history])


def busy(response: httpx.Response) -> Fault | None:
    """For an answer after which it is worth asking again."""
    if response.status_code not in MAY_PASS:
        return None
    return Fault(f"HTTP {response.status_code} {response.reason_phrase}".rstrip(), head(response).retry_after())


def said(error: Exception) -> str:
    """What a library says went wrong, in one line; some say nothing."""
    return one_line(error) or type(error).__name__
