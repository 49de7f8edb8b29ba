"""A folder on any file system that fsspec knows: object stores, archives, memory."""

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fsspec

from reshard import limits
from reshard.errors import SourceError, UsageError
from reshard.safe_text import one_line
from reshard.source.address import WEB, last_part
from reshard.source.base import Origin
from reshard.source.filesystems import missing_package
from reshard.source.listing import listed
from reshard.source.retry import MAY_PASS, Fault
from reshard.source.watched import within

# What another try does not mend.
_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
# What may differ between two looks at the same file: when it was last read.
_NOT_STATE = frozenset({"time", "accessTime", "last_access_time", "last_accessed_on"})


@dataclass(frozen=True)
class RemoteFiles:
    """The files directly in a folder."""

    fs: Any  # fsspec.AbstractFileSystem, which has no types
    path: str
    origin: Origin
    sizes: Mapping[str, int]
    _states: dict[str, str] = field(default_factory=dict)

    def seconds(self, size: int) -> float:
        """See Remote: a range is shown when all of it is there."""
        return limits.SILENCE_SECONDS + size / limits.WHOLE_PIECE_SPEED

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in one piece, of the file as it was when it was first asked for."""
        path = posixpath.join(self.path, file)
        try:
            first = self._states.get(file) or self._states.setdefault(file, self._state(path))
            data = bytes(self.fs.cat_file(path, start=start, end=stop))
            state = self._state(path)
        except Exception as error:  # whatever the file system's package raises: a connection that broke, mostly
            if _may_pass(error):
                raise Fault(_said(error)) from None
            raise SourceError(f"{self.origin.name}: {file}: cannot be read: {_said(error)}") from None
        if state != first:
            raise SourceError(f"{self.origin.name}: {file}: has changed since it was first read; start again")
        if len(data) > stop - start:
            raise Fault(f"the server answers the range {start} to {stop} with {len(data)} bytes")
        yield data

    def _state(self, path: str) -> str:
        """What the file system says of a file, its size with it, which is another when the file has changed.

        `ukey` is to be that, and is the address alone in some.
        """
        info = self.fs.info(path)
        return repr(sorted((key, str(value)) for key, value in info.items() if key not in _NOT_STATE))


def find_folder(address: str) -> RemoteFiles:
    """The files in the folder that an address names. Raises Fault, SourceError, UsageError, MissingDependencyError.

    Credentials come from where the file system's package takes them, such as AWS_ACCESS_KEY_ID or ~/.aws for s3fs.
    """
    place = address
    if any(link.partition("://")[0].lower() in WEB for link in address.split("::")):
        raise UsageError(f"{place}: an archive on a plain HTTP server is not read from there; download it")
    try:
        # Listings that are kept would hide that an object changed; an instance that is kept would be shared.
        fs, path = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise missing_package(address, error) from None
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{place}: {one_line(error)}") from None
    try:
        sizes = within(limits.LISTING_SECONDS, partial(_sizes, fs, path))
    except Fault:
        raise
    except Exception as error:  # whatever the file system's package raises
        if isinstance(error, OSError) and _may_pass(error):
            raise Fault(_said(error)) from None
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{place}: no such folder at that address; check its spelling") from None
        raise SourceError(
            f"{place}: cannot be listed ({_said(error)}); check the address and the credentials"
        ) from None
    if not sizes:
        raise SourceError(f"{place}: no files at that address; give the folder that holds the checkpoint's")
    return RemoteFiles(fs, path, Origin("remote", last_part(address)), listed(sizes, place))


def _sizes(fs: Any, path: str) -> list[tuple[str, object]]:
    """The names of the files there, and their sizes."""
    entries = fs.ls(path, detail=True)
    files = [e for e in entries if e["type"] == "file" and not e["name"].endswith("/")]  # some mark folders so
    sizes = {entry["name"]: entry.get("size") for entry in files if entry["name"] != path.rstrip("/")}
    unknown = [name for name, size in sizes.items() if size is None]  # not every listing has sizes
    sizes |= dict(zip(unknown, fs.sizes(unknown), strict=True)) if unknown else {}
    return [(posixpath.basename(name), size) for name, size in sizes.items()]


def _may_pass(error: BaseException) -> bool:
    """Whether another try may mend it: by the HTTP status, where it has one."""
    status = getattr(error, "status", None)
    return status in MAY_PASS if isinstance(status, int) else not isinstance(error, _STAYS)


def _said(error: BaseException) -> str:
    """What a library says went wrong, in one line, with its kind: some say only a name."""
    return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
