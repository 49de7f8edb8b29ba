"""A folder on any file system that fsspec knows: object stores, archives, memory."""

import posixpath
import resource
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from reshard import limits
from reshard.errors import SourceError, UsageError
from reshard.safe_text import one_line
from reshard.source.address import WEB, last_part
from reshard.source.answers import Head, RangedFiles
from reshard.source.base import Origin
from reshard.source.filesystems import missing_package
from reshard.source.listing import listed, too_many
from reshard.source.retry import MAY_PASS, Fault
from reshard.source.watched import within
from reshard.source.weights import named_as_sets

# What another try does not mend.
_STAYS = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError)
# What may differ between two looks at the same file: when it was last read.
_NOT_STATE = frozenset({"time", "accessTime", "last_access_time", "last_accessed_on"})


class RemoteFiles(RangedFiles):
    """The files directly in a folder of any file system, whose driver shows a range when all of it is there."""

    def __init__(self, fs: Any, path: str, origin: Origin, sizes: Mapping[str, int], folders: Collection[str]) -> None:
        super().__init__(origin, sizes)
        self.folders = folders
        self.fs, self.path = fs, path  # fsspec.AbstractFileSystem, which has no types

    def seconds(self, size: int) -> float:
        """See Remote."""
        return limits.DRIVER_SECONDS + size / limits.WHOLE_PIECE_SPEED

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop), of the file as it was when it was first asked for."""
        try:
            yield from self._read(file, posixpath.join(self.path, file), start, stop)
        except (Fault, SourceError):
            raise
        except Exception as error:  # whatever the file system's package raises: a connection that broke, mostly
            if _may_pass(error):
                raise Fault(_said(error)) from None
            raise SourceError(f"{self.origin.name}: {file}: cannot be read: {_said(error)}") from None

    def _read(self, file: str, path: str, start: int, stop: int) -> Iterator[bytes]:
        first = self._states.get(file) or self._states.setdefault(file, self._state(file, path))
        data = bytes(self.fs.cat_file(path, start=start, end=stop))
        if self._state(file, path) != first:
            raise self._changed(file)
        if len(data) > stop - start:
            raise Fault(f"the server answers the range {start} to {stop} with {len(data)} bytes")
        yield data

    def _state(self, file: str, path: str) -> str:
        """What the file system says of a file, which is another when the file has changed.

        `ukey` is to be that, and is the address alone in some.
        """
        info = self.fs.info(path)
        if info.get("size") not in (None, self.sizes[file]):
            raise self._changed(file)
        return repr(sorted((key, str(value)) for key, value in info.items() if key not in _NOT_STATE))

    def _changed(self, file: str) -> SourceError:
        return SourceError(f"{self.origin.name}: {file}: has changed since it was first read; start again")


class S3Files(RemoteFiles):
    """Of an S3 store: by the same client, whose answers say what they are, and come piece by piece."""

    def seconds(self, size: int) -> float:
        """See Remote."""
        return limits.DRIVER_SECONDS

    def _read(self, file: str, path: str, start: int, stop: int) -> Iterator[bytes]:
        bucket, key, _ = self.fs.split_path(path)
        answer = self.fs.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        said, body = answer["ResponseMetadata"], answer["Body"]
        try:
            pieces = iter(lambda: bytes(sync(self.fs.loop, body.read, limits.PROGRESS_BYTES)), b"")
            yield from self.taken(file, Head(said["HTTPStatusCode"], said["HTTPHeaders"]), pieces, start, stop)
        finally:
            body.close()


def find_folder(address: str) -> RemoteFiles:
    """The files in the folder that an address names. Raises Fault, SourceError, UsageError, MissingDependencyError.

    Credentials come from where the file system's package takes them, such as AWS_ACCESS_KEY_ID or ~/.aws for s3fs.
    """
    place = address
    if any(link.partition("://")[0].lower() in WEB for link in address.split("::")):
        raise UsageError(f"{place}: an archive on a plain HTTP server is not read from there; download it")
    try:
        # Listings that are kept would hide that an object changed; an instance that is kept would be shared.
        open_fs = partial(fsspec.url_to_fs, address, use_listings_cache=False, skip_instance_cache=True)
        fs, path = within(limits.LISTING_SECONDS, open_fs)
    except ImportError as error:
        raise missing_package(address, error) from None
    except Fault:
        raise
    except Exception as error:  # of an address, or of what is no archive
        raise UsageError(f"{place}: {one_line(error)}") from None
    try:
        is_s3 = hasattr(fs, "call_s3")
        entries = partial(_s3_entries if is_s3 else _entries, fs, path)
        sizes, names = within(limits.LISTING_SECONDS, entries, _memory_bound(place))
    except (Fault, SourceError):
        raise
    except Exception as error:  # whatever the file system's package raises
        if isinstance(error, OSError) and _may_pass(error):
            raise Fault(_said(error)) from None
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{place}: no such folder at that address; check its spelling") from None
        raise SourceError(
            f"{place}: cannot be listed ({_said(error)}); check the address and the credentials"
        ) from None
    folders = named_as_sets(names)
    if not sizes and not folders:
        raise SourceError(f"{place}: no files at that address; give the folder that holds the checkpoint's")
    kind = S3Files if is_s3 else RemoteFiles
    return kind(fs, path, Origin("remote", last_part(address)), listed(sizes, place), folders)


_Entries = tuple[list[tuple[str, object]], list[str]]
"""The names of files and their sizes; the names of folders."""


def _entries(fs: Any, path: str) -> _Entries:
    entries = fs.ls(path, detail=True)
    files = [e for e in entries if e["type"] == "file" and not e["name"].endswith("/")]  # some mark folders so
    sizes = {entry["name"]: entry.get("size") for entry in files if entry["name"] != path.rstrip("/")}
    unknown = [name for name, size in sizes.items() if size is None]  # not every listing has sizes
    sizes |= dict(zip(unknown, fs.sizes(unknown), strict=True)) if unknown else {}
    folders = [posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory"]
    return [(posixpath.basename(name), size) for name, size in sizes.items()], folders


def _s3_entries(fs: Any, path: str) -> _Entries:
    """As `_entries`, page by page: no more of them than a checkpoint has, nor of folders, are asked for."""
    bucket, key, _ = fs.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key else ""
    found: list[tuple[str, object]] = []
    folders: list[str] = []
    more: dict[str, str] = {}
    seen = 0
    while seen <= limits.LISTING_FILES:
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **more)
        entries = page.get("Contents", [])
        found += [(entry["Key"].removeprefix(prefix), entry["Size"]) for entry in entries if entry["Key"][-1:] != "/"]
        below = page.get("CommonPrefixes", [])
        folders += [entry.get("Prefix", "").removeprefix(prefix).rstrip("/") for entry in below]
        seen += max(1, len(entries) + len(below))
        if not page.get("IsTruncated"):
            if seen == 1 and not entries and "CommonPrefixes" not in page:
                raise FileNotFoundError(path)
            return found, folders
        more = {"ContinuationToken": page["NextContinuationToken"]}
    raise too_many(f"s3://{path}")


def _memory_bound(place: str) -> Callable[[], None]:
    """A call that raises SourceError once this process holds so much more than now; while a folder is listed it does
    nothing else.
    """

    def held() -> int:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()

    before = held()

    def check() -> None:
        if held() - before > limits.LISTING_MEMORY:
            raise SourceError(
                f"{place}: its list takes more than {limits.LISTING_MEMORY >> 20} MiB; give a checkpoint's own folder"
            )

    return check


def _may_pass(error: BaseException) -> bool:
    """Whether another try may mend it: by the HTTP status, where it has one."""
    status = getattr(error, "status", None)
    return status in MAY_PASS if isinstance(status, int) else not isinstance(error, _STAYS)


def _said(error: BaseException) -> str:
    """What a library says went wrong, in one line, with its kind: some say only a name."""
    return f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
