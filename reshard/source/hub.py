"""A model repository on the Hugging Face Hub, or on what HF_ENDPOINT names: byte ranges of the files of one commit.

All requests go through huggingface_hub's own client, with its token and endpoint. Not its HfApi, which reads an answer
of any length, nor its HfFileSystem: that one takes any answer to a range for the range (a whole file, another commit's,
another length), and waits between tries as long as a server likes, deaf to Ctrl-C. Endpoints:
/api/models/{repo}/revision/{revision}?blobs=true gives the commit and every file's size in one answer,
/{repo}/resolve/{commit}/{file} redirects to the bytes.
"""

import re
import reprlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx, validate_repo_id

from reshard import __version__, limits
from reshard.errors import SourceError
from reshard.safe_text import one_line
from reshard.source.answers import Head
from reshard.source.base import Origin
from reshard.source.http import HttpFiles, Request, Unreachable, busy, read_small, said
from reshard.source.listing import listed
from reshard.source.retry import Fault
from reshard.strict_json import parse_object

_COMMIT = "x-repo-commit"
_IS_COMMIT = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")  # by SHA-1 or SHA-256
_NO_HUB = "is HF_ENDPOINT a hub?"


class HubFiles(HttpFiles):
    """The files at the top of a model repository, of one commit."""

    def __init__(self, repo: str, endpoint: str, commit: str, sizes: Mapping[str, int]) -> None:
        super().__init__(Origin("hub", repo, commit), sizes, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self.repo, self.endpoint, self.commit = repo, endpoint, commit

    def request(self, file: str) -> Request:
        return _request(hf_hub_url(self.repo, file, revision=self.commit, endpoint=self.endpoint))

    def refusal(self, response: httpx.Response, file: str) -> Fault | SourceError:
        return _refusal(response, self.repo, self.endpoint, self.commit, file)

    def check(self, file: str, head: Head) -> None:
        """The commit pins a file at the hub; a mirror may serve what it likes, and then its ETag tells."""
        for commit in filter(None, (headers.get(_COMMIT) for headers in (*head.redirects, head.headers))):
            if commit != self.commit:
                raise SourceError(
                    f"{self.repo}: {file}: the answer is of commit {commit}, {self.commit} was asked for; nothing of "
                    "it is taken: check HF_ENDPOINT"
                )
        super().check(file, head)


def find_repository(repo: str, revision: str | None, endpoint: str | None = None) -> HubFiles:
    """The files of a revision, by its commit. Raises Fault or SourceError.

    endpoint: the hub's address; None for what HF_ENDPOINT says.
    """
    endpoint = endpoint or constants.ENDPOINT

    def check(response: httpx.Response) -> None:
        if response.status_code != HTTPStatus.OK:
            raise _refusal(response, repo, endpoint, revision)

    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    try:
        validate_repo_id(repo)
        body = read_small(_request(f"{endpoint}/api/models/{repo}{at}?blobs=true"), check, limits.LISTING_BYTES)
    except Unreachable as error:
        raise _no_folder(
            repo, f"{endpoint} cannot be reached ({error}); check the name, the network and HF_ENDPOINT"
        ) from None
    except OfflineModeIsEnabled:
        raise _no_folder(repo, f"HF_HUB_OFFLINE forbids to ask {endpoint}; check the name, or unset it") from None
    except HFValidationError as error:
        raise _no_folder(repo, f"no repository: {said(error)}") from None
    try:
        described = parse_object(body, f"{repo}: what {endpoint} says of it")
    except SourceError as error:
        raise SourceError(f"{error}; {_NO_HUB}") from None
    return HubFiles(repo, endpoint, _commit(described, repo), listed(_siblings(described, repo), f"{repo}: {endpoint}"))


def _commit(described: Mapping[str, Any], repo: str) -> str:
    commit = described.get("sha")
    if not isinstance(commit, str) or not _IS_COMMIT.fullmatch(commit):
        raise SourceError(f"{repo}: its commit is said to be {reprlib.repr(commit)}, expected 40 hex digits; {_NO_HUB}")
    return commit


def _siblings(described: Mapping[str, Any], repo: str) -> list[tuple[object, object]]:
    files = described.get("siblings")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise SourceError(
            f"{repo}: its files are said to be {reprlib.repr(files)}, expected a list of objects; {_NO_HUB}"
        )
    return [(file.get("rfilename"), file.get("size")) for file in files]


def _request(url: str) -> Request:
    """With the account's token. Raises SourceError for one that cannot be sent.

    Not huggingface_hub's headers: to name what runs it, it asks the endpoint for a list, of any length.
    """
    headers = {"user-agent": f"reshard/{__version__}; hf_hub/{huggingface_hub.__version__}"}
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["authorization"] = f"Bearer {token}"
        if not token.isascii():
            raise SourceError(
                "this account's token has characters that no token has; check HF_TOKEN, or `hf auth login`"
            )
    return Request(get_session(), url, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _refusal(
    response: httpx.Response, repo: str, endpoint: str, revision: str | None, file: str | None = None
) -> Fault | SourceError:
    """What an answer that brings nothing means."""
    if wait := busy(response):
        return wait
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    why = ", ".join(filter(None, (f"HTTP {status}", one_line(response.headers.get("X-Error-Message", "")))))
    way_in = "take a token that may read it (`hf auth login`, or HF_TOKEN)"
    if not get_token():
        way_in = "log in with `hf auth login`, or set HF_TOKEN"
    if code == "GatedRepo":
        return SourceError(f"{repo}: is gated: accept its terms at {endpoint}/{repo}, then {way_in}")
    if code == "RevisionNotFound":
        return SourceError(f"{repo}: has no revision {revision or 'main'}; name a branch, tag or commit that it has")
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
