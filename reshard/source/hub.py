"""A model repository on the Hugging Face Hub, or on what HF_ENDPOINT names: byte ranges of the files of one commit.

All requests go through huggingface_hub's own client, with its token and endpoint. Its waiting between tries does not:
that one can neither be cut off nor go on within a range. Endpoints: /api/models/{repo}/revision/{revision}?blobs=true
gives the commit and every file's size in one answer, /{repo}/resolve/{commit}/{file} redirects to the bytes.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, httpx, parse_ratelimit_headers

from reshard import __version__
from reshard.errors import SourceError
from reshard.source.address import redacted
from reshard.source.base import Cancelled, Origin
from reshard.source.retry import MAY_PASS, Fault

_LIBRARY = "reshard"
_COMMIT = "X-Repo-Commit"
_LINKED_ETAG = "X-Linked-Etag"  # of the file, at the hub's redirect; the store behind it has ETags of its own


class HubFiles:
    """The files at the top of a model repository. `revision` is resolved to a commit once, with the list of them.

    endpoint: the hub's address; None for what HF_ENDPOINT says.
    """

    def __init__(self, repo: str, revision: str | None, endpoint: str | None = None) -> None:
        self._repo = repo
        self._revision = revision
        self._endpoint = endpoint or constants.ENDPOINT
        self._commit: str | None = None
        self._sizes: dict[str, int] = {}
        self._etags: dict[str, str] = {}
        self._lock = threading.Lock()
        self._open: set[httpx.Response] = set()
        self._cancelled = False

    @property
    def origin(self) -> Origin:
        """The repository and, once its files are listed, the commit."""
        return Origin("hub", self._repo, self._commit)

    def sizes(self) -> Mapping[str, int]:
        """Every file's name and size in bytes."""
        if self._commit is None:
            self._list()
        return self._sizes

    def _list(self) -> None:
        api = HfApi(self._endpoint, library_name=_LIBRARY, library_version=__version__)
        try:
            info = api.model_info(
                self._repo, revision=self._revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except httpx.ConnectError as error:
            raise SourceError(
                f"{self._repo}: no folder is called so, and {self._endpoint} cannot be reached ({_said(error)}); "
                "see to the name, the network and HF_ENDPOINT"
            ) from None
        except httpx.HTTPError as error:
            response = getattr(error, "response", None)  # HfHubHTTPError has one
            raise (Fault(_said(error)) if response is None else self._refusal(response)) from None
        except OfflineModeIsEnabled:
            raise SourceError(
                f"{self._repo}: no folder is called so, and HF_HUB_OFFLINE forbids to ask {self._endpoint}; see to the "
                "name, or unset it"
            ) from None
        except (HFValidationError, httpx.InvalidURL) as error:
            raise SourceError(f"{self._repo}: no folder is called so, and no repository: {_said(error)}") from None
        except UnicodeEncodeError:
            raise SourceError(
                f"{self._repo}: the token of this account holds what no token can; see to HF_TOKEN, or `hf auth login`"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{self._repo}: {self._endpoint} answers with no description of a model ({_said(error)}); does "
                "HF_ENDPOINT name a hub?"
            ) from None
        top = {file.rfilename: file.size for file in info.siblings or () if "/" not in file.rfilename}
        self._sizes = {name: size for name, size in top.items() if size is not None}
        if top and not self._sizes:
            raise SourceError(
                f"{self._repo}: {self._endpoint} does not say how large its files are; see to HF_ENDPOINT"
            )
        if not info.sha:
            raise SourceError(f"{self._repo}: {self._endpoint} names no commit; does HF_ENDPOINT name a hub?")
        self._commit = info.sha

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) as they come."""
        url = hf_hub_url(self._repo, file, revision=self._commit, endpoint=self._endpoint)
        headers = {
            **build_hf_headers(library_name=_LIBRARY, library_version=__version__),
            "range": f"bytes={start}-{stop - 1}",
            "accept-encoding": "identity",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with (
                get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
                self._listed(response),
            ):
                self._check(response, file, start, stop)
                yield from response.iter_raw()
        except httpx.HTTPError as error:
            raise Fault(_said(error)) from None
        except (OfflineModeIsEnabled, httpx.InvalidURL) as error:
            raise SourceError(f"{self._repo}: {_said(error)}") from None

    def cancel(self) -> None:
        """Hang up. A server that has fallen silent would be waited for until the timeout."""
        with self._lock:
            self._cancelled = True
            for response in self._open:
                stream = response.extensions.get("network_stream")
                if stream is not None:
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def close(self) -> None:
        """Nothing is held: the client is huggingface_hub's."""

    @contextlib.contextmanager
    def _listed(self, response: httpx.Response) -> Iterator[None]:
        """An answer that `cancel` may cut off."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._open.add(response)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(response)

    def _check(self, response: httpx.Response, file: str, start: int, stop: int) -> None:
        """Whether an answer is the range of the file of the commit, before any of its bytes is taken."""
        if response.status_code not in (200, 206):
            raise self._refusal(response, file)
        for step in (*response.history, response):
            commit = step.headers.get(_COMMIT)
            if commit is not None and commit != self._commit:
                raise SourceError(
                    f"{self._repo}: {file}: the answer is of commit {commit}, {self._commit} was asked for; nothing of "
                    "it is taken: see to HF_ENDPOINT"
                )
        size = self._sizes[file]
        if response.status_code == 200 and (start, stop) != (0, size):
            raise Fault(f"the server answers the range {start} to {stop} with the whole file")
        wanted, got = f"bytes {start}-{stop - 1}/{size}", response.headers.get("Content-Range")
        if response.status_code == 206 and got != wanted:
            raise Fault(f"the server answers with {got or 'no Content-Range'}, {wanted} is wanted")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            raise Fault(f"the answer has {length} bytes, {stop - start} are wanted")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise Fault(f"the answer is encoded as {encoding}, identity was asked for")
        self._check_unchanged(response, file)

    def _check_unchanged(self, response: httpx.Response, file: str) -> None:
        """The commit pins a file at the hub; a mirror may serve what it likes, and then its ETag tells."""
        linked = (step.headers.get(_LINKED_ETAG) for step in response.history)
        etag = next(filter(None, linked), None) or response.headers.get("ETag")
        if etag is None:
            return
        first = self._etags.setdefault(file, etag.removeprefix("W/"))
        if first != etag.removeprefix("W/"):
            raise SourceError(
                f"{self._repo}: {file}: has changed since it was first read (its ETag was {first} and is {etag}); "
                "start again"
            )

    def _refusal(self, response: httpx.Response, file: str | None = None) -> Fault | SourceError:
        """What an answer that brings nothing means."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        why = ", ".join(filter(None, (f"HTTP {status}", redacted(response.headers.get("X-Error-Message", "")))))
        if status in MAY_PASS:
            return Fault(f"HTTP {status} {response.reason_phrase}".rstrip(), _retry_after(response))
        if code == "GatedRepo":
            return SourceError(
                f"{self._repo}: is gated: accept its terms at {self._endpoint}/{self._repo}, then {self._way_in()}"
            )
        if code == "RevisionNotFound":
            revision = self._commit or self._revision or "main"
            return SourceError(f"{self._repo}: has no revision {revision}; see to --revision")
        if status == 404 and file is not None:
            return SourceError(f"{self._repo}: {file}: is listed and not there (HTTP 404); try again")
        if status in (401, 403) and file is not None:
            return SourceError(f"{self._repo}: {file}: is listed and may not be read ({why}): {self._way_in()}")
        if status in (401, 403, 404):
            return SourceError(
                f"{self._repo}: no folder is called so, and {self._endpoint} knows no such repository, or it is "
                f"private ({why}): see to the name, or {self._way_in()}"
            )
        return SourceError(f"{self._repo}: {file or self._endpoint}: {why}")

    def _way_in(self) -> str:
        if get_token():
            return "take a token that may read it (`hf auth login`, or HF_TOKEN)"
        return "log in with `hf auth login`, or set HF_TOKEN"


def _said(error: Exception) -> str:
    """What a library says went wrong, in one line; some say nothing."""
    return redacted(error) or type(error).__name__


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a busy server asks for: `RateLimit` of the hub's, or Retry-After as a number or a date."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
