"""A folder on any file system that fsspec knows: object stores, HTTP servers, archives, memory."""

import posixpath
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec

from reshard.address import redacted
from reshard.errors import SourceError, UsageError
from reshard.filesystems import missing_package
from reshard.source.base import Origin
from reshard.source.transport import Fault

_AT_ONCE = 16
# What another try does not mend.
_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)


class RemoteFiles:
    """The files directly in the folder that an address names.

    Credentials come from where the file system's package takes them, such as AWS_ACCESS_KEY_ID or ~/.aws for s3fs.
    """

    def __init__(self, address: str) -> None:
        self._name = _name(address)
        try:
            # Listings that are kept would hide that an object changed; an instance that is kept would be shared.
            self._fs, self._path = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise missing_package(address, error) from None
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(f"{self._name}: {redacted(error)}") from None
        self._sizes: dict[str, int] = {}
        self._keys: dict[str, str] = {}

    @property
    def origin(self) -> Origin:
        """The folder's name, without what stands before it: hosts, buckets and credentials stay out of manifests."""
        return Origin("remote", self._name)

    def sizes(self) -> Mapping[str, int]:
        """Every file's name and size in bytes."""
        try:
            entries = self._fs.ls(self._path, detail=True)
            files = [e for e in entries if e["type"] == "file" and e["name"].rstrip("/") != self._path.rstrip("/")]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                sizes = dict(pool.map(self._size, files))
        except FileNotFoundError:
            raise SourceError(f"{self._name}: no such folder at that address; see to its spelling") from None
        except Exception as error:  # whatever the file system's package raises
            if isinstance(error, OSError) and not isinstance(error, _STAYS):
                raise Fault(_said(error)) from None
            raise SourceError(
                f"{self._name}: cannot be listed ({_said(error)}); see to the address and the credentials"
            ) from None
        if not sizes:
            raise SourceError(f"{self._name}: no files at that address; give the folder that holds the checkpoint's")
        for file, size in sizes.items():
            if size is None:
                raise SourceError(f"{self._name}: {file}: the server does not say its size; copy the files here")
            self._sizes[file] = int(size)
        return self._sizes

    def _size(self, entry: dict[str, Any]) -> tuple[str, int | None]:
        """A file's name and size; not every listing has sizes."""
        size = entry["size"] if entry.get("size") is not None else self._fs.info(entry["name"]).get("size")
        return posixpath.basename(entry["name"]), size

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in one piece, of the file as it was when it was first asked for."""
        path = posixpath.join(self._path, file)
        try:
            key = self._keys.get(file) or self._keys.setdefault(file, self._fs.ukey(path))
            data = self._fs.cat_file(path, start=start, end=stop)
            after = self._fs.ukey(path)
        except _STAYS as error:
            raise SourceError(f"{self._name}: {file}: cannot be read: {_said(error)}") from None
        except Exception as error:  # whatever the file system's package raises: a connection that broke, mostly
            raise Fault(_said(error)) from None
        if after != key:
            raise SourceError(f"{self._name}: {file}: has changed since it was first read; start again")
        if len(data) > stop - start:
            raise Fault(f"the server answers the range {start} to {stop} with {len(data)} bytes")
        yield data

    def close(self) -> None:
        """Nothing is held that outlives this object."""


def _name(address: str) -> str:
    """The last part of an address's path, or the bucket's or the file system's name where there is no path."""
    protocol, _, rest = address.partition("::")[0].rpartition("://")
    path = rest.partition("?")[0].partition("#")[0].rpartition("@")[2].strip("/")
    return path.rpartition("/")[2] or protocol or "remote"


def _said(error: Exception) -> str:
    """What a library says went wrong, in one line, with its kind: some say only a name."""
    return f"{type(error).__name__}: {redacted(error)}".rstrip(": ")
