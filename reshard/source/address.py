"""What an address means: a folder here, a repository on the hub, or a folder on another file system.

- `hf://ORG/NAME`, `hf://ORG/NAME@REVISION`: the hub
- any other `scheme://…` or `scheme::…`: the file system of that name; `file://` and `local://` are this host's
- what exists here: that
- `ORG/NAME`, where nothing here is called so: the hub
- anything else: a folder here, which is missing
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from reshard.errors import UsageError

_LABEL = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"{_LABEL}/{_LABEL}")
_HUB = re.compile(rf"hf://({_LABEL}/{_LABEL})/?(?:@(.+))?")
_SCHEME = re.compile(r"([a-z0-9][a-z0-9+._-]*)(?:://|::)", re.IGNORECASE)
_ONE_SLASH = re.compile(r"([a-z0-9][a-z0-9+._-]+):/", re.IGNORECASE)
_LOCAL = ("file", "local")
_USER = re.compile(r"://[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^?\s'\"]*)\?[^\s'\"]*")


@dataclass(frozen=True)
class Address:
    """`place`: a path, ORG/NAME, or an fsspec address."""

    kind: Literal["folder", "hub", "remote"]
    place: str
    revision: str | None = None


def parse_address(text: str, revision: str | None = None) -> Address:
    """What a text means, with the value of --revision. Raises UsageError where the two contradict each other."""
    if revision == "":
        raise UsageError("--revision: is empty; name a branch, tag or commit, or leave it out")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() == "hf":
        named = _HUB.fullmatch(text)
        if named is None:
            raise UsageError(f"{text}: is no model repository; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
        own = unquote(named[2]) if named[2] else None
        if own and revision is not None and own != revision:
            raise UsageError(f"--revision {revision}: the address names {own}; give one of them")
        return Address("hub", named[1], own or revision)
    if not scheme and not Path(text).exists() and _REPOSITORY.fullmatch(text):
        return Address("hub", text, revision)
    if scheme and scheme[1].lower() not in _LOCAL:
        found = Address("remote", text)
    else:
        found = Address("folder", text[scheme.end() :] if scheme else text)
    if revision is not None:
        raise UsageError(f"--revision {revision}: that is for a hub repository, and a folder has no revisions")
    return found


def parse_target(text: str) -> Address:
    """What a text means as a place to write to: a folder here, or one on another file system. Raises UsageError."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        if not text:
            raise UsageError("an empty OUT names no place: give a folder, or an address such as s3://BUCKET/PATH")
        if typo := _ONE_SLASH.match(text):
            raise UsageError(f"{text}: an address is written {typo[1]}://…, and a folder of that name ./{text}")
        return Address("folder", text)
    if scheme[1].lower() == "hf":
        raise UsageError(f"{text}: the hub is read, not written; give a folder, and upload it with hf upload")
    found = parse_address(text)
    if not (found.place if found.kind == "folder" else text[scheme.end() :].strip("/")):
        raise UsageError(f"{text}: names no place; give an address such as s3://BUCKET/PATH")
    return found


def parse_local_target(text: str, writer: str) -> Path:
    """What a text means as a place to write to where only this host will do. Raises UsageError; writer: who says so."""
    found = parse_target(text)
    if found.kind != "folder":
        raise UsageError(f"{text}: {writer} writes to this host only; give a path here, and copy what is written")
    return Path(found.place)


def redacted(text: object) -> str:
    """A library's message as one line, its addresses without users, passwords and signatures."""
    line = " ".join(str(text).split())
    return _QUERY.sub(r"\1", _USER.sub("://", line))


def shown(address: str) -> str:
    """An address as reports and messages show it: without user, password and signature."""
    return redacted(address) if "://" in address else address
