"""An object store, or any other file system that fsspec knows, as target.

Nothing is renamed there: a shard is uploaded in parts under its final name and seen when its upload is completed; the
manifest, put last, is the commit. There are no locks.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractBufferedFile

from reshard.errors import OutputError, UsageError
from reshard.manifest import Record
from reshard.model.naming import MANIFEST
from reshard.source.address import redacted
from reshard.source.filesystems import missing_package
from reshard.writer.target import REPLACED, Contents, rank_of, sort_names

T = TypeVar("T")

PART_BYTES = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10,000


class RemoteTarget:
    """The files directly below an fsspec address. Raises MissingDependencyError, UsageError."""

    stages = False

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        protocol = address.partition("://")[0]
        if re.search(r"//[^/@]*:[^/@]*@", address):
            raise UsageError(
                f"{protocol}://: the address holds a password; give credentials by the environment or the store's own "
                "configuration"
            )
        if "::" in protocol:
            raise UsageError(f"{self.address}: is a chain of file systems; give the address of the last one")
        try:
            self._fs, root = fsspec.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            raise missing_package(self.address, error) from error
        except Exception as error:
            raise UsageError(f"{self.address}: is no address that can be used: {_text(error)}") from error
        self._root = str(root).rstrip("/")

    def contents(self) -> Contents:
        """Look at what is there."""
        return sort_names(self._listing())

    @contextlib.contextmanager
    def writing(self, ranks: Sequence[int] | None) -> Iterator["_NoLock"]:
        """Nothing to make and nothing to lock."""
        yield _NoLock()

    def check_space(self, wanted: int) -> None:
        """A store has no end that is known."""

    def create(self, name: str, size: int) -> "Upload":
        """Begin an upload."""
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        return Upload(self, name, self._try("written", name, lambda path: self._open(path, part)))

    def look(self, name: str, size: int) -> str | None:
        """See that a file is there in its size. Returns its ETag."""
        info = self._try("looked at", name, self._fs.info)
        if info["size"] != size:
            raise OutputError(
                f"{self.address}/{name}: {info['size']} bytes are there, {size} were sent; does another run write "
                "there? Run the same command with --resume"
            )
        return _etag(info)

    def files(self) -> Mapping[str, int]:
        """Names and sizes, as they are now."""
        return {name: info["size"] for name, info in self._listing().items() if info["type"] == "file"}

    def read(self, name: str) -> bytes:
        """A small file."""
        return self._try("read", name, lambda path: bytes(self._fs.cat_file(path)))

    def holds(self, record: Record) -> bool:
        """Whether size and, where the store and the record have one, ETag are the recorded ones. Nothing is fetched."""
        info = self._try("looked at", record.shard.file, self._fs.info)
        there = _etag(info)
        return info["size"] == record.shard.size and (None in (there, record.etag) or there == record.etag)

    def put(self, name: str, data: bytes) -> None:
        """A small file, in one request; one that holds that already is left alone."""
        if self._try("looked at", name, self._size) == len(data) and self.read(name) == data:
            return
        self._try("written", name, lambda path: self._fs.pipe_file(path, data))

    def take_manifest_away(self) -> None:
        """Kept under another name, which says that a set is being replaced; then deleted."""
        if MANIFEST in self.files():
            self.put(REPLACED, self.read(MANIFEST))
            self.remove([MANIFEST])

    def remove(self, names: Iterable[str]) -> None:
        """Delete files."""
        there = self.files()
        for name in names:
            if name in there:
                self._try("deleted", name, self._delete)

    def remove_temporaries(self, ranks: Collection[int | None] | None) -> None:
        """Abort the uploads that killed runs left in an S3 bucket: they are not seen, and are paid for."""
        if not hasattr(self._fs, "call_s3"):
            return
        bucket, _, prefix = f"{self._root}/".partition("/")
        # Whoever may not list them may still write; a bucket's life-cycle rule clears them then.
        with contextlib.suppress(Exception):
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
            for upload in found.get("Uploads", []):
                name = upload["Key"].removeprefix(prefix)
                if "/" not in name and (rank := rank_of(name)) is not None and (ranks is None or rank in ranks):
                    self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def attempt(self, what: str, name: str, call: Callable[[], T]) -> T:
        """A call of a store's driver, whose errors are its own: an OutputError says what could not be done."""
        try:
            return call()
        except Exception as error:
            raise OutputError(
                f"{self.address}/{name}".rstrip("/") + f": cannot be {what}: {_text(error)}; see to the address, the "
                "credentials and the network, then run the same command with --resume"
            ) from error

    def _try(self, what: str, name: str, call: Callable[[str], T]) -> T:
        return self.attempt(what, name, lambda: call(f"{self._root}/{name}"))

    def _listing(self) -> dict[str, dict[str, Any]]:
        """Name -> what the store says of it."""

        def listing() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                return list(self._fs.ls(self._root, detail=True))
            except FileNotFoundError:
                return []

        entries = self.attempt("listed", "", listing)
        if (
            len(entries) == 1
            and entries[0]["type"] == "file"
            and entries[0]["name"].lstrip("/") == self._root.strip("/")  # with a slash behind: a folder that is empty
        ):
            raise OutputError(f"{self.address}: is a file; give an address below which files can be written")
        named = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in entries}
        return {name: entry for name, entry in named.items() if str(entry["name"]).strip("/") != self._root.strip("/")}

    def _open(self, path: str, part: int) -> Any:
        try:
            return self._fs.open(path, "wb", block_size=part)
        except FileNotFoundError:  # a file system with folders
            self._fs.makedirs(self._root, exist_ok=True)
            return self._fs.open(path, "wb", block_size=part)

    def _size(self, path: str) -> int | None:
        try:
            return int(self._fs.info(path)["size"])
        except FileNotFoundError:
            return None

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def forget(self, name: str) -> None:
        """Delete what a writer without parts has left."""
        with contextlib.suppress(OutputError):
            self._try("deleted", name, self._delete)


class Upload:
    """A file that is being uploaded in parts."""

    def __init__(self, target: RemoteTarget, name: str, file: Any) -> None:
        self.name = name
        self.size = 0
        self._target = target
        self._file = file

    def write(self, data: memoryview) -> None:
        """Append bytes; a full part is sent."""
        self._target.attempt("written", self.name, lambda: self._file.write(data))
        self.size += len(data)

    def close(self) -> None:
        """Send the last part and complete the upload."""
        self._target.attempt("written", self.name, self._file.close)

    def commit(self) -> str | None:
        """It is seen already: see that it is whole. Returns its ETag."""
        return self._target.look(self.name, self.size)

    def discard(self) -> None:
        """Abort the upload. (`close` would complete it, and so would the end of the object's life.)"""
        if isinstance(self._file, AbstractBufferedFile):
            with contextlib.suppress(Exception):
                self._file.discard()
            self._file.closed = True
        else:
            with contextlib.suppress(Exception):
                self._file.close()
            self._target.forget(self.name)


class _NoLock:
    """The turn where none can be taken: of two runs that end together, both write the same manifest."""

    exclusive = False

    def finish(self) -> bool:
        """Always."""
        return True


def _etag(info: Mapping[str, Any]) -> str | None:
    value = info.get("ETag") or info.get("etag")
    return value.strip('"') if isinstance(value, str) else None


def _text(error: BaseException) -> str:
    """A driver's message; some say nothing."""
    return redacted(error).rstrip(".") or type(error).__name__
