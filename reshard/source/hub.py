"""A model repository on the Hugging Face Hub, or on what HF_ENDPOINT names: byte ranges of the files of one commit.

All requests go through huggingface_hub's own client, with its token and endpoint. Its waiting between tries does not:
that one can neither be cut off nor go on within a range. Endpoints: /api/models/{repo}/revision/{revision}?blobs=true
gives the commit and every file's size in one answer, /{repo}/resolve/{commit}/{file} redirects to the bytes.
"""

import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, httpx, parse_ratelimit_headers

from reshard import __version__
from reshard.address import redacted
from reshard.errors import SourceError
from reshard.source.base import Origin
from reshard.source.transport import Fault

_LIBRARY = "reshard"
_MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})
_COMMIT = "X-Repo-Commit"


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
        except (OfflineModeIsEnabled, HFValidationError, httpx.InvalidURL) as error:
            raise SourceError(f"{self._repo}: {_said(error)}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{self._repo}: {self._endpoint} answers with no description of a model ({_said(error)}); does "
                "HF_ENDPOINT name a hub?"
            ) from None
        for file in info.siblings or ():
            if "/" not in file.rfilename and file.size is not None:
                self._sizes[file.rfilename] = file.size
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
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                self._check(response, file, start, stop)
                yield from response.iter_raw()
        except httpx.HTTPError as error:
            raise Fault(_said(error)) from None
        except (OfflineModeIsEnabled, httpx.InvalidURL) as error:
            raise SourceError(f"{self._repo}: {_said(error)}") from None

    def close(self) -> None:
        """Nothing is held: the client is huggingface_hub's."""

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

    def _refusal(self, response: httpx.Response, file: str | None = None) -> Fault | SourceError:
        """What an answer that brings nothing means."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in _MAY_PASS:
            return Fault(f"HTTP {status} {response.reason_phrase}".rstrip(), _retry_after(response))
        if code == "GatedRepo":
            return SourceError(
                f"{self._repo}: is gated: accept its terms at {self._endpoint}/{self._repo}, then {self._way_in()}"
            )
        if code == "RevisionNotFound":
            return SourceError(f"{self._repo}: has no revision {self._revision or 'main'}; see to --revision")
        if status == 404 and file is not None:
            return SourceError(f"{self._repo}: {file}: is listed and not there (HTTP 404); try again")
        if status in (401, 403, 404):
            return SourceError(
                f"{self._repo}: no folder is called so, and {self._endpoint} knows no such repository, or it is "
                f"private (HTTP {status}): see to the name, or {self._way_in()}"
            )
        return SourceError(f"{self._repo}: {file or self._endpoint}: HTTP {status} {response.reason_phrase}")

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
    except ValueError:
        return None
