"""A folder on any file system that fsspec knows: object stores, HTTP servers, archives, memory."""

import asyncio
import posixpath
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec

from reshard.errors import SourceError, UsageError
from reshard.source.address import redacted
from reshard.source.base import Cancelled, Origin
from reshard.source.filesystems import missing_package
from reshard.source.retry import MAY_PASS, Fault

_AT_ONCE = 16
# What another try does not mend.
_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
# What may differ between two looks at the same file: where HTTP was redirected to, and when the file was last read.
_NOT_STATE = frozenset({"url", "time", "accessTime", "last_access_time", "last_accessed_on"})
_PLAIN = {"headers": {"Accept-Encoding": "identity"}}

_T = TypeVar("_T")


class RemoteFiles:
    """The files directly in the folder that an address names.

    Credentials come from where the file system's package takes them, such as AWS_ACCESS_KEY_ID or ~/.aws for s3fs.
    """

    def __init__(self, address: str) -> None:
        self._name = _name(address)
        self._place = redacted(address)
        try:
            # Listings that are kept would hide that an object changed; an instance that is kept would be shared.
            self._fs, self._path = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise missing_package(address, error) from None
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(f"{self._place}: {redacted(error)}") from None
        self._is_http = address.partition("://")[0] in ("http", "https")
        self._sizes: dict[str, int] = {}
        self._states: dict[str, str] = {}
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._cancelled = False

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
        except Exception as error:  # whatever the file system's package raises
            if (self._is_http or isinstance(error, OSError)) and self._may_pass(error):
                raise Fault(_said(error)) from None
            if isinstance(error, FileNotFoundError):
                raise SourceError(f"{self._place}: no such folder at that address; see to its spelling") from None
            raise SourceError(
                f"{self._place}: cannot be listed ({_said(error)}); see to the address and the credentials"
            ) from None
        if not sizes:
            raise SourceError(f"{self._place}: no files at that address; give the folder that holds the checkpoint's")
        for file, size in sizes.items():
            if size is None:
                raise SourceError(f"{self._place}: {file}: the server does not say its size; copy the files here")
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
            first = self._states.get(file) or self._states.setdefault(file, self._state(path))
            data = self._read(path, self._sizes[file], start, stop)
            state = self._state(path)
        except Cancelled:
            raise
        except Exception as error:  # whatever the file system's package raises: a connection that broke, mostly
            if self._may_pass(error):
                raise Fault(_said(error)) from None
            raise SourceError(f"{self._name}: {file}: cannot be read: {_said(error)}") from None
        if state != first:
            raise SourceError(f"{self._name}: {file}: has changed since it was first read; start again")
        if len(data) > stop - start:
            raise Fault(f"the server answers the range {start} to {stop} with {len(data)} bytes")
        yield data

    def cancel(self) -> None:
        """Drop what is waited for: some file systems wait for minutes for a server that has fallen silent."""
        with self._lock:
            self._cancelled = True
            waiting = tuple(self._waiting)
        for future in waiting:
            future.cancel()

    def close(self) -> None:
        """Nothing is held that outlives this object."""

    def _state(self, path: str) -> str:
        """What the file system says of a file, which is another when the file has changed.

        `ukey` is to be that: for HTTP it is the address alone.
        """
        info = self._wait(self._fs._info(path)) if self._fs.async_impl else self._fs.info(path)
        return repr(sorted((key, str(value)) for key, value in info.items() if key not in _NOT_STATE))

    def _read(self, path: str, size: int, start: int, stop: int) -> bytes:
        if self._is_http:
            # Its `cat_file` takes a whole file into memory where a server knows no ranges; this one raises ValueError.
            file = self._fs.open(path, size=size, cache_type="none", **_PLAIN)
            data: bytes = self._wait(file.async_fetch_range(start, stop))
        elif self._fs.async_impl:
            data = self._wait(self._fs._cat_file(path, start=start, end=stop))
        else:
            data = self._fs.cat_file(path, start=start, end=stop)
        return data

    def _wait(self, call: Coroutine[Any, Any, _T]) -> _T:
        """A call's result. Raises Cancelled when `cancel` says so."""
        future = asyncio.run_coroutine_threadsafe(call, self._fs.loop)
        with self._lock:
            self._waiting.add(future)
            if self._cancelled:
                future.cancel()
        try:
            return future.result()
        except CancelledError:
            raise Cancelled from None
        finally:
            with self._lock:
                self._waiting.discard(future)

    def _may_pass(self, error: BaseException) -> bool:
        """Whether another try may mend it. Of HTTP fsspec says "not found", whatever happened; the cause tells."""
        if self._is_http:
            error = error.__cause__ or error
            status = getattr(error, "status", None)
            if status is not None:
                return status in MAY_PASS
        return not isinstance(error, _STAYS)


def _name(address: str) -> str:
    """The last part of an address's path; where there is none, the file system's name, not the host's or bucket's."""
    protocol, _, rest = address.partition("::")[0].rpartition("://")
    _, _, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return path.strip("/").rpartition("/")[2] or protocol or "remote"


def _said(error: Exception) -> str:
    """What a library says went wrong, in one line, with its kind: some say only a name."""
    return f"{type(error).__name__}: {redacted(error)}".rstrip(": ")
