"""A folder on a plain HTTP server: the page that lists it, and the files that the page links to."""

import html
import re
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from http import HTTPStatus
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from reshard import __version__, limits
from reshard.errors import SourceError, UsageError
from reshard.safe_text import one_line
from reshard.source.address import last_part
from reshard.source.base import Origin
from reshard.source.fetchers import Fetchers, result_of
from reshard.source.http import HttpFiles, Request, asked, busy, head, httpx, read_small
from reshard.source.listing import listed, too_many
from reshard.source.retry import Fault
from reshard.source.watched import within
from reshard.source.weights import named_as_sets

_AT_ONCE = 8
_PLACE_OF = re.compile(r"bytes (?:0-0|\*)/([0-9]{1,19})")
# Linear in the page: nothing runs across the next "<".
_LINK = re.compile(r"""<a\s[^<>]*?href\s*=\s*(?:"([^"<>]*)"|'([^'<>]*)'|([^\s<>"']+))""", re.IGNORECASE)


class WebFiles(HttpFiles):
    """The files that are linked to, directly below the page's address.

    The address's user and password, and its query, such as a signature, go with every request.
    """

    def __init__(self, address: str) -> None:
        super().__init__(Origin("remote", last_part(address)), {}, limits.SILENCE_SECONDS)
        self._place = address
        self._client = httpx.Client(follow_redirects=True)
        weakref.finalize(self, self._client.close).atexit = False
        self._folder = _split(address)
        self._whole_only: set[str] = set()  # files of which the server gives no ranges
        self.sizes = listed(self._files(), self._place)

    def request(self, file: str) -> Request:
        return self._request(self._folder.path + quote(file))

    def refusal(self, response: httpx.Response, file: str) -> Fault | SourceError:
        if wait := busy(response):
            return wait
        status, where = response.status_code, f"{self._place}: {file}"
        if status == HTTPStatus.NOT_FOUND:
            return SourceError(f"{where}: is listed and not there (HTTP 404); mend the page, or try again")
        return SourceError(f"{where}: cannot be read: HTTP {status}; check the address and the credentials")

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        if file in self._whole_only and start > 0:
            raise SourceError(f"{self._place}: {file}: the server gives whole files only; copy the files here")
        yield from super().fetch(file, start, stop)

    def _request(self, path: str) -> Request:
        url = urlunsplit(self._folder._replace(path=path))
        return Request(self._client, url, {"user-agent": f"reshard/{__version__}"}, self.patience)

    def _files(self) -> Iterator[tuple[str, int | None]]:
        page = read_small(self._request(self._folder.path), self._check_page, limits.LISTING_BYTES)
        links = dict.fromkeys(link for found in _LINK.findall(page.decode(errors="replace")) for link in found)
        if len(links) > limits.LISTING_FILES:
            raise too_many(self._place)
        names, folders = _linked(links, self._folder)
        self.folders = named_as_sets(folders)
        if not names and not self.folders:
            raise SourceError(f"{self._place}: no files at that address; give the folder that holds the checkpoint's")
        listed(((name, 0) for name in names), self._place)  # before a request for each
        fetchers = Fetchers(_AT_ONCE)
        try:
            sizes = [fetchers.soon(partial(within, self.patience, partial(self._size, name))) for name in names]
            for name, size in zip(names, sizes, strict=True):
                yield name, result_of(size)
        finally:
            fetchers.cancel()

    def _check_page(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == HTTPStatus.NOT_FOUND:
            raise SourceError(f"{self._place}: no such folder at that address; check its spelling")
        if status != HTTPStatus.OK:
            raise busy(response) or SourceError(
                f"{self._place}: cannot be listed (HTTP {status}); check the address and the credentials"
            )

    def _size(self, file: str) -> int | None:
        """By the answer to a range, as every byte is asked for later: what HEAD says may be another's."""
        with asked(self.request(file), 0, 1) as response:
            status, headers = response.status_code, response.headers
            if status == HTTPStatus.OK:
                self._whole_only.add(file)
                length = re.fullmatch("([0-9]{1,19})", headers.get("Content-Length", ""))
            elif status in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
                length = _PLACE_OF.fullmatch(headers.get("Content-Range", ""))
            else:
                raise self.refusal(response, file)
            self.check(file, head(response))
            return int(length[1]) if length else None


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        parts = parts._replace(path=parts.path.rstrip("/") + "/", fragment="")
        if not parts.hostname or parts.port == 0:
            raise ValueError("it names no host")
        httpx.URL(urlunsplit(parts))
    except (ValueError, httpx.InvalidURL) as error:
        raise UsageError(f"{address}: is no address that can be asked: {one_line(error)}") from None
    return parts


def _linked(links: Iterable[str], folder: SplitResult) -> tuple[list[str], list[str]]:
    """The names of files, and of folders, directly below a folder that its page's links lead to, each once."""
    base = urlunsplit(folder._replace(query=""))
    files: dict[str, None] = {}
    folders: dict[str, None] = {}
    for each in links:
        try:
            link = urlsplit(urljoin(base, html.unescape(each)))
        except ValueError:
            continue
        rest = link.path.removeprefix(folder.path)
        name = rest.removesuffix("/")
        below = name != "" and rest != link.path and "/" not in name
        if below and link.scheme in ("http", "https") and link.hostname == folder.hostname and not link.query:
            (files if name == rest else folders)[unquote(name, errors="surrogateescape")] = None
    return list(files), list(folders)


def find_folder(address: str) -> WebFiles:
    """The files in the folder at an address. Raises Fault, SourceError, UsageError."""
    return WebFiles(address)
