"""A folder on any file system that fsspec knows: object stores, HTTP servers, archives, memory."""

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import fsspec

from reshard.errors import SourceError, UsageError
from reshard.safe_text import one_line
from reshard.source.base import Origin
from reshard.source.filesystems import missing_package
from reshard.source.retry import MAY_PASS, Fault

# What another try does not mend.
_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
# What may differ between two looks at the same file: where HTTP was redirected to, and when the file was last read.
_NOT_STATE = frozenset({"url", "time", "accessTime", "last_access_time", "last_accessed_on"})
_PLAIN = {"headers": {"Accept-Encoding": "identity"}}


@dataclass(frozen=True)
class RemoteFiles:
    """The files directly in a folder."""

    fs: Any  # fsspec.AbstractFileSystem, which has no types
    path: str
    origin: Origin
    sizes: Mapping[str, int]
    _states: dict[str, str] = field(default_factory=dict)

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in one piece, of the file as it was when it was first asked for."""
        path = posixpath.join(self.path, file)
        try:
            first = self._states.get(file) or self._states.setdefault(file, self._state(path))
            data = self._read(path, self.sizes[file], start, stop)
            state = self._state(path)
        except Exception as raised:  # whatever the file system's package raises: a connection that broke, mostly
            error = _cause(self.fs, raised)
            if _may_pass(error):
                raise Fault(_said(error)) from None
            raise SourceError(f"{self.origin.name}: {file}: cannot be read: {_said(error)}") from None
        if state != first:
            raise SourceError(f"{self.origin.name}: {file}: has changed since it was first read; start again")
        if len(data) > stop - start:
            raise Fault(f"the server answers the range {start} to {stop} with {len(data)} bytes")
        yield data

    def _state(self, path: str) -> str:
        """What the file system says of a file, which is another when the file has changed.

        `ukey` is to be that: for HTTP it is the address alone.
        """
        info = self.fs.info(path)
        return repr(sorted((key, str(value)) for key, value in info.items() if key not in _NOT_STATE))

    def _read(self, path: str, size: int, start: int, stop: int) -> bytes:
        if _is_http(self.fs):
            # Its `cat_file` takes a whole file into memory where a server knows no ranges; this one raises ValueError.
            with self.fs.open(path, size=size, cache_type="none", **_PLAIN) as stream:
                stream.seek(start)
                return bytes(stream.read(stop - start))
        return bytes(self.fs.cat_file(path, start=start, end=stop))


def find_folder(address: str) -> RemoteFiles:
    """The files in the folder that an address names. Raises Fault, SourceError, UsageError, MissingDependencyError.

    Credentials come from where the file system's package takes them, such as AWS_ACCESS_KEY_ID or ~/.aws for s3fs.
    """
    place = address
    try:
        # Listings that are kept would hide that an object changed; an instance that is kept would be shared.
        fs, path = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise missing_package(address, error) from None
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{place}: {one_line(error)}") from None
    try:
        entries = fs.ls(path, detail=True)
        files = [e for e in entries if e["type"] == "file" and e["name"].rstrip("/") != path.rstrip("/")]
        sizes = {entry["name"]: entry.get("size") for entry in files}
        unknown = [name for name, size in sizes.items() if size is None]  # not every listing has sizes
        sizes |= dict(zip(unknown, fs.sizes(unknown), strict=True)) if unknown else {}
    except Exception as raised:  # whatever the file system's package raises
        cause = _cause(fs, raised)
        if (_is_http(fs) or isinstance(cause, OSError)) and _may_pass(cause):
            raise Fault(_said(cause)) from None
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == HTTPStatus.NOT_FOUND:
            raise SourceError(f"{place}: no such folder at that address; check its spelling") from None
        raise SourceError(
            f"{place}: cannot be listed ({_said(cause)}); check the address and the credentials"
        ) from None
    if not sizes:
        raise SourceError(f"{place}: no files at that address; give the folder that holds the checkpoint's")
    for name, size in sizes.items():
        if size is None:
            raise SourceError(
                f"{place}: {posixpath.basename(name)}: the server does not say its size; copy the files here"
            )
    named = {posixpath.basename(name): int(size) for name, size in sizes.items()}
    return RemoteFiles(fs, path, Origin("remote", _name(address)), named)


def _is_http(fs: Any) -> bool:
    return "http" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _cause(fs: Any, error: BaseException) -> BaseException:
    """Of HTTP fsspec says "not found", whatever happened."""
    return error.__cause__ or error if _is_http(fs) else error


def _may_pass(error: BaseException) -> bool:
    """Whether another try may mend it: by the HTTP status, where it has one."""
    status = getattr(error, "status", None)
    return status in MAY_PASS if isinstance(status, int) else not isinstance(error, _STAYS)


def _name(address: str) -> str:
    """The last part of an address's path; where there is none, the file system's name, not the host's or bucket's."""
    protocol, _, rest = address.partition("::")[0].rpartition("://")
    _, _, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return path.strip("/").rpartition("/")[2] or protocol or "remote"


def _said(error: BaseException) -> str:
    """What a library says went wrong, in one line, with its kind: some say only a name."""
    return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
