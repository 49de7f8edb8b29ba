"""A model repository on the Hugging Face Hub, or on what HF_ENDPOINT names: byte ranges of the files of one commit.

All requests go through huggingface_hub's own client, with its token and endpoint. Not its HfFileSystem: that one takes
any answer to a range for the range (a whole file, another commit's, another length), and waits between tries as long as
a server likes, deaf to Ctrl-C. Endpoints: /api/models/{repo}/revision/{revision}?blobs=true gives the commit and every
file's size in one answer, /{repo}/resolve/{commit}/{file} redirects to the bytes.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, httpx, parse_ratelimit_headers

from reshard import __version__
from reshard.errors import SourceError
from reshard.safe_text import one_line
from reshard.source.base import Origin
from reshard.source.retry import MAY_PASS, Fault

_CLIENT: dict[str, Any] = {"library_name": "reshard", "library_version": __version__}
_COMMIT = "X-Repo-Commit"
_LINKED_ETAG = "X-Linked-Etag"  # of the file, at the hub's redirect; the store behind it has ETags of its own


@dataclass(frozen=True)
class HubFiles:
    """The files at the top of a model repository, of one commit."""

    repo: str
    endpoint: str
    commit: str
    sizes: Mapping[str, int]
    _etags: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> Origin:
        return Origin("hub", self.repo, self.commit)

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) as they come."""
        url = hf_hub_url(self.repo, file, revision=self.commit, endpoint=self.endpoint)
        wanted = {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        headers, timeout = build_hf_headers(**_CLIENT) | wanted, constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                if response.status_code not in (200, 206):
                    raise _refusal(response, self.repo, self.endpoint, self.commit, file)
                if wrong := _not_the_range(response, start, stop, self.sizes[file]):
                    raise Fault(wrong)
                self._check_unchanged(response, file)
                yield from response.iter_raw()
        except httpx.HTTPError as error:
            raise Fault(_said(error)) from None
        except (OfflineModeIsEnabled, httpx.InvalidURL) as error:
            raise SourceError(f"{self.repo}: {_said(error)}") from None

    def _check_unchanged(self, response: httpx.Response, file: str) -> None:
        """The commit pins a file at the hub; a mirror may serve what it likes, and then its ETag tells."""
        steps = (*response.history, response)
        for commit in filter(None, (step.headers.get(_COMMIT) for step in steps)):
            if commit != self.commit:
                raise SourceError(
                    f"{self.repo}: {file}: the answer is of commit {commit}, {self.commit} was asked for; nothing of "
                    "it is taken: check HF_ENDPOINT"
                )
        linked = filter(None, (step.headers.get(_LINKED_ETAG) for step in response.history))
        etag = next(linked, response.headers.get("ETag", "")).removeprefix("W/")
        if etag and (first := self._etags.setdefault(file, etag)) != etag:
            raise SourceError(
                f"{self.repo}: {file}: has changed since it was first read (its ETag was {first} and is {etag}); "
                "start again"
            )


def find_repository(repo: str, revision: str | None, endpoint: str | None = None) -> HubFiles:
    """The files of a revision, by its commit. Raises Fault or SourceError.

    endpoint: the hub's address; None for what HF_ENDPOINT says.
    """
    endpoint = endpoint or constants.ENDPOINT
    try:
        info = HfApi(endpoint, **_CLIENT).model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        top = {file.rfilename: file.size for file in info.siblings or () if "/" not in file.rfilename}
    except httpx.ConnectError as error:
        raise _no_folder(
            repo, f"{endpoint} cannot be reached ({_said(error)}); check the name, the network and HF_ENDPOINT"
        ) from None
    except httpx.HTTPError as error:
        response = getattr(error, "response", None)  # HfHubHTTPError has one
        if response is None:
            raise Fault(_said(error)) from None
        raise _refusal(response, repo, endpoint, revision) from None
    except OfflineModeIsEnabled:
        raise _no_folder(repo, f"HF_HUB_OFFLINE forbids to ask {endpoint}; check the name, or unset it") from None
    except (HFValidationError, httpx.InvalidURL) as error:
        raise _no_folder(repo, f"no repository: {_said(error)}") from None
    except UnicodeEncodeError:
        raise SourceError(
            f"{repo}: the token of this account has characters that no token has; check HF_TOKEN, or `hf auth login`"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"{repo}: {endpoint} answers with no description of a model ({_said(error)}); is HF_ENDPOINT a hub?"
        ) from None
    sizes = {name: size for name, size in top.items() if size is not None}
    if top and not sizes:
        raise SourceError(f"{repo}: {endpoint} does not say how large its files are; check HF_ENDPOINT")
    if not info.sha:
        raise SourceError(f"{repo}: {endpoint} names no commit; is HF_ENDPOINT a hub?")
    return HubFiles(repo, endpoint, info.sha, sizes)


def _not_the_range(response: httpx.Response, start: int, stop: int, size: int) -> str | None:
    """What is wrong with an answer, by its head."""
    expected, got = f"bytes {start}-{stop - 1}/{size}", response.headers.get("Content-Range")
    if response.status_code == 200 and (start, stop) != (0, size):
        return f"the server answers the range {start} to {stop} with the whole file"
    if response.status_code == 206 and got != expected:
        return f"the server answers with {got or 'no Content-Range'}, expected {expected}"
    if (length := response.headers.get("Content-Length")) not in (None, str(stop - start)):
        return f"the answer has {length} bytes, expected {stop - start}"
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        return f"the answer is encoded as {encoding}, identity was asked for"
    return None


def _refusal(
    response: httpx.Response, repo: str, endpoint: str, revision: str | None, file: str | None = None
) -> Fault | SourceError:
    """What an answer that brings nothing means."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    why = ", ".join(filter(None, (f"HTTP {status}", one_line(response.headers.get("X-Error-Message", "")))))
    way_in = "take a token that may read it (`hf auth login`, or HF_TOKEN)"
    if not get_token():
        way_in = "log in with `hf auth login`, or set HF_TOKEN"
    if status in MAY_PASS:
        return Fault(f"HTTP {status} {response.reason_phrase}".rstrip(), _retry_after(response))
    if code == "GatedRepo":
        return SourceError(f"{repo}: is gated: accept its terms at {endpoint}/{repo}, then {way_in}")
    if code == "RevisionNotFound":
        return SourceError(f"{repo}: has no revision {revision or 'main'}; check --revision")
    if status == 404 and file is not None:
        return SourceError(f"{repo}: {file}: is listed and not there (HTTP 404); try again")
    if status in (401, 403) and file is not None:
        return SourceError(f"{repo}: {file}: is listed and may not be read ({why}): {way_in}")
    if status in (401, 403, 404):
        return _no_folder(
            repo, f"{endpoint} knows no such repository, or it is private ({why}): check the name, or {way_in}"
        )
    return SourceError(f"{repo}: {file or endpoint}: {why}")


def _no_folder(repo: str, why: str) -> SourceError:
    """For ORG/NAME, which may be meant as a folder."""
    return SourceError(f"{repo}: no local folder with that name, and {why}")


def _said(error: Exception) -> str:
    """What a library says went wrong, in one line; some say nothing."""
    return one_line(error) or type(error).__name__


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
