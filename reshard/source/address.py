"""What an address means: a folder here, a repository on a hub, or a folder on another file system.

- `hf://ORG/NAME`, `hf://ORG/NAME@REVISION`: the hub of that scheme (HUBS)
- any other `scheme://…` or `scheme::…`: the file system of that name; `file://` and `local://` are this host's
- what exists here: that
- `ORG/NAME`, where there is no local folder with that name: the Hugging Face Hub
- anything else: a folder here, which is missing
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from reshard.errors import UsageError
from reshard.regular import is_there
from reshard.safe_text import keep_secret, redacted


@dataclass(frozen=True)
class Hub:
    """A site of model repositories.

    module: has `find_repository(repo, revision)`, which raises as reshard.source.range_cache.StagedSource says. It is
    imported when it is needed, with `package` from version `since` on, and once `endpoint`, the environment variable
    with the site's address, holds an address or nothing.
    """

    module: str
    package: str
    since: str
    endpoint: str


# huggingface_hub: the first that names its own HTTP client, httpx or httpx2. The project asks for no version of it: an
# engine's environment may want an older one, and only here is it used.
HUBS = {"hf": Hub("reshard.source.hub", "huggingface_hub", "1.31", "HF_ENDPOINT")}
FOLDER, REMOTE = "folder", "remote"
WEB = ("http", "https")
"""Schemes of plain servers: what they answer is compared with what was asked for, which no driver of fsspec's does."""

_LABEL = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"{_LABEL}/{_LABEL}")
_REVISED = re.compile(rf"://({_LABEL}/{_LABEL})/?(?:@(.+))?")
_SCHEME = re.compile(r"([a-z0-9][a-z0-9+._-]*)(?:://|::)", re.IGNORECASE)
_ONE_SLASH = re.compile(r"([a-z0-9][a-z0-9+._-]+):/", re.IGNORECASE)
_LOCAL = ("file", "local")


@dataclass(frozen=True)
class Address:
    """`kind`: FOLDER, REMOTE or one of HUBS. `place`: a path, an fsspec address or ORG/NAME."""

    kind: str
    place: str
    revision: str | None = None


def parse_address(text: str, revision: str | None = None) -> Address:
    """What a text means, with the value of --revision. Raises UsageError where the two contradict each other."""
    if revision == "":
        raise UsageError("--revision: is empty; name a branch, tag or commit, or leave it out")
    keep_secret(text)
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else None
    if scheme in HUBS:
        named = _REVISED.fullmatch(text, len(scheme))
        if named is None:
            raise UsageError(
                f"{text}: is no model repository; write {scheme}://ORG/NAME or {scheme}://ORG/NAME@REVISION"
            )
        own = unquote(named[2]) if named[2] else None
        if own and revision is not None and own != revision:
            raise UsageError(f"--revision {revision}: the address names {own}; give one of them")
        return Address(scheme, named[1], own or revision)
    if not match and not is_there(Path(text)) and _REPOSITORY.fullmatch(text):
        return Address("hf", text, revision)
    if revision is not None:
        raise UsageError(f"--revision {revision}: that is for a hub repository, and a folder has no revisions")
    if match and scheme not in _LOCAL:
        return Address(REMOTE, text)
    return Address(FOLDER, text[match.end() :] if match else text)


def parse_target(text: str) -> Address:
    """What a text means as a place to write to: a folder here, or one on another file system. Raises UsageError."""
    keep_secret(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        if not text:
            raise UsageError("an empty OUT names no place: give a folder, or an address such as s3://BUCKET/PATH")
        if typo := _ONE_SLASH.match(text):
            raise UsageError(f"{text}: an address is written {typo[1]}://…, and a folder of that name ./{text}")
        return Address(FOLDER, text)
    if scheme[1].lower() in HUBS:
        raise UsageError(f"{text}: a hub is read, not written; give a folder, and upload it (hf upload)")
    if scheme[1].lower() in WEB:
        raise UsageError(f"{text}: a plain HTTP server is read, not written; give a folder or a store's address")
    found = parse_address(text)
    if not (found.place if found.kind == FOLDER else text[scheme.end() :].strip("/")):
        raise UsageError(f"{text}: names no place; give an address such as s3://BUCKET/PATH")
    return found


def parse_local_target(text: str, writer: str) -> Path:
    """What a text means as a place to write to where only this host will do. Raises UsageError; writer: who says so."""
    found = parse_target(text)
    if found.kind != FOLDER:
        raise UsageError(f"{text}: {writer} writes to this host only; give a path here, and copy what is written")
    return Path(found.place)


def last_part(address: str) -> str:
    """The last part of an address's path; where there is none, the file system's name, not the host's or bucket's."""
    protocol, _, rest = address.partition("::")[0].rpartition("://")
    _, _, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return path.strip("/").rpartition("/")[2] or protocol or "remote"


def shown(address: str) -> str:
    """An address as reports and messages show it: without user, password and signature."""
    return redacted(address) if "://" in address else address
