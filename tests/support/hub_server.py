"""A server that speaks the hub's endpoints for one repository, on a port of this host, with faults on demand.

/api/models/{repo}/revision/{revision}   the commit; with ?blobs=true every file's size
/{repo}/resolve/{commit}/{file}          302 to /blobs/{commit}/{file}, with X-Repo-Commit, X-Linked-Size, X-Linked-Etag
                                         and, as for files that Xet stores, X-Xet-Hash
/blobs/{commit}/{file}                   the bytes; ranges; no token is needed here, as at the hub's store
/blobs/{commit}/                         a page with links to files and folders: the store is a plain server, too
/blobs?prefix={commit}                   and S3's, of the bucket `blobs`: its list of the files
"""

import contextlib
import hashlib
import json
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "org/model"
COMMIT = "1" * 40
ORIGIN = {"kind": "hub", "name": REPO, "commit": COMMIT}
SECRET = "Signature=very-secret"


@dataclass(frozen=True)
class Asked:
    """A request: what it is for, and how the client came."""

    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    agent: str

    @property
    def is_data(self) -> bool:
        return self.path.startswith("/blobs/") and self.file != ""

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_weights(self) -> bool:
        return self.is_data and self.file.endswith(".safetensors")

    @property
    def bounds(self) -> tuple[int, int]:
        """The range that is asked for: its first byte, and the one behind its last."""
        first, last = (int(number) for number in (self.range or "").removeprefix("bytes=").split("-"))
        return first, last + 1

    @property
    def is_big(self) -> bool:
        """A range of a weight, not a header's."""
        return self.is_weights and self.bounds[1] - self.bounds[0] > 50_000


Fault = Callable[["Handler", Asked], bool]
"""Answers a request itself, or returns False to leave it to the server."""


@dataclass
class Hub:
    """What the server knows and what it saw."""

    commits: dict[str, Path]
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None
    gated: bool = False  # described to everyone, its files for the token only
    prefix: str = ""  # of all paths, as a proxy's
    fault: Fault = lambda handler, asked: False
    url: str = ""
    store: str = ""  # another origin: the token must stay behind
    asked: list[Asked] = field(default_factory=list)
    data_bytes: int = 0
    over: threading.Event = field(default_factory=threading.Event)  # for faults that take long: it ends
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def page(self) -> str:
        """The address of the store's folder with the first commit's files."""
        return f"{self.url}/blobs/{next(iter(self.commits))}"

    def data_requests(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.is_data]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = Asked(
            self.command,
            unquote(parts.path).removeprefix(self.hub.prefix),
            parts.query,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers.get("User-Agent", ""),
        )
        with self.hub.lock:
            self.hub.asked.append(asked)
        if not self.hub.fault(self, asked):
            self._route(asked)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def _route(self, asked: Asked) -> None:
        hub = self.hub
        if asked.is_data:
            commit, _, file = asked.path.removeprefix("/blobs/").rpartition("/")
            path = hub.commits.get(commit, Path("nowhere")) / file
            if path.is_file():
                self.send_range(path.read_bytes(), asked.range)
            else:
                self.answer(404)
            return
        if asked.path == "/blobs":
            (prefix,) = parse_qs(asked.query)["prefix"]
            files = sorted(hub.commits[prefix.rstrip("/")].iterdir())
            self.answer(200, bucket_list({f"{prefix}{p.name}": p.stat().st_size for p in files}))
            return
        if match := re.fullmatch("/blobs/(.+)/", asked.path):
            names = sorted(path.name + "/" * path.is_dir() for path in hub.commits[match[1]].iterdir())
            self.answer(200, "".join(f'<a href="{name}">{name}</a>' for name in names).encode())
            return
        if self._is_refused(asked):
            code = "GatedRepo" if hub.gated else "RepoNotFound"
            self.answer(403 if asked.authorization and hub.gated else 401, headers={"X-Error-Code": code})
        elif match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", asked.path):
            self._describe(match[1] or "main", "blobs" in parse_qs(asked.query))
        elif match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/([^/]+)", asked.path):
            self._resolve(hub.refs.get(match[1], match[1]), match[2])
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def _is_refused(self, asked: Asked) -> bool:
        hub = self.hub
        if hub.token is None or (hub.gated and asked.path.startswith("/api/")):
            return False
        return asked.authorization != f"Bearer {hub.token}"

    def _describe(self, revision: str, blobs: bool) -> None:
        commit = self.hub.refs.get(revision, revision)
        if commit not in self.hub.commits:
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(self.hub.commits[commit].iterdir())
        siblings = [{"rfilename": p.name} | ({"size": p.stat().st_size} if blobs else {}) for p in files]
        siblings.append({"rfilename": "figures/benchmark.jpg"} | ({"size": 7} if blobs else {}))
        described = {"id": REPO, "modelId": REPO, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        self.answer(200, json.dumps(described).encode(), {"Content-Type": "application/json"})

    def _resolve(self, commit: str, file: str) -> None:
        path = self.hub.commits.get(commit, Path("nowhere")) / file
        if not path.is_file():
            code = "EntryNotFound" if commit in self.hub.commits else "RevisionNotFound"
            self.answer(404, headers={"X-Error-Code": code})
            return
        headers = {
            "Location": f"{self.hub.store}/blobs/{commit}/{file}?{SECRET}",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(path.stat().st_size),
            "X-Linked-Etag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"',
            "X-Xet-Hash": "0" * 64,
            "Link": f'<{self.hub.url}/api/models/{REPO}/xet-read-token/{commit}>; rel="xet-auth"',
        }
        self.answer(302, headers=headers)

    def send_range(self, data: bytes, wanted: str | None) -> None:
        """A range with 206, or the whole with 200."""
        state = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if wanted is None:
            self.answer(200, data, state)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        assert match, wanted
        start, stop = int(match[1]), int(match[2]) + 1
        if not start < stop <= len(data):
            self.answer(416)
            return
        self.answer(206, data[start:stop], state | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        """Answer. cut: send only so many bytes of the body that the head announces, and hang up."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = body if cut is None else body[:cut]
        if self.command != "HEAD":
            if urlsplit(self.path).path.startswith("/blobs/"):
                with self.hub.lock:
                    self.hub.data_bytes += len(sent)
            self.wfile.write(sent)
        if cut is not None:
            self.close_connection = True

    def endless(self, status: int, headers: dict[str, str], chunk: bytes, pause: float = 0.0) -> None:
        """An answer without an end: the same chunk again and again, until the client hangs up or the server ends."""
        self.send_response(status)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while not self.hub.over.wait(pause):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def bucket_list(sizes: dict[str, int]) -> bytes:
    """S3's ListObjectsV2 of keys."""
    each = (f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in sizes.items())
    return f"<ListBucketResult><KeyCount>{len(sizes)}</KeyCount>{''.join(each)}</ListBucketResult>".encode()


@contextmanager
def serving(hub: Hub, certificate: Path | None = None) -> Iterator[Hub]:
    """The hub, answering at `hub.url` until the block ends. certificate: with its key, then by https."""
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if certificate is None else "https"
    hub.url = f"{scheme}://127.0.0.1:{server.server_address[1]}{hub.prefix}"
    hub.store = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
