"""An object store, or any other file system that fsspec knows, as target.

A shard is made in a temporary folder of this host, read back, and put; the manifest, put last, is the commit. There are
no locks.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from blake3 import blake3

from reshard import limits
from reshard.errors import OutputError, UsageError
from reshard.manifest import Shard
from reshard.safe_text import one_line
from reshard.source.filesystems import missing_package
from reshard.source.watched import within
from reshard.workers import Cancelled
from reshard.writer.file import DirectFile
from reshard.writer.folder import OutputFolder, check_space
from reshard.writer.target import Tick

T = TypeVar("T")

_BLOCK = 16 << 20


class RemoteTarget:
    """The files directly below an fsspec address: a Target. Raises MissingDependencyError, UsageError."""

    _here: OutputFolder  # while `writing`

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
            open_fs = partial(fsspec.url_to_fs, self.address, use_listings_cache=False)
            self._fs, root = within(limits.LISTING_SECONDS, open_fs)
        except ImportError as error:
            raise missing_package(self.address, error) from error
        except Exception as error:
            raise UsageError(f"{self.address}: is no address that can be used: {_text(error)}") from error
        self._root = str(root).rstrip("/")

    def files(self) -> Mapping[str, int]:
        entries = self._attempt("listed", "", self._list)
        if [(str(entry["name"]).lstrip("/"), entry["type"]) for entry in entries] == [(self._root.strip("/"), "file")]:
            raise OutputError(f"{self.address}: is a file; give an address below which files can be written")
        found = {str(entry["name"]).strip("/"): entry["size"] or 0 for entry in entries}
        return {name.rpartition("/")[2]: size for name, size in found.items() if name != self._root.strip("/")}

    @contextlib.contextmanager
    def writing(self, ranks: Sequence[int] | None) -> Iterator[Callable[[], bool]]:
        with tempfile.TemporaryDirectory(prefix="reshard-", ignore_cleanup_errors=True) as place:
            self._here = OutputFolder(Path(place))
            with self._here.writing(ranks):
                yield lambda: True

    def check_room(self, names: Iterable[str], wanted: int) -> None:
        way_out = "the shards are made here before they are put: name a folder on a larger disk with TMPDIR"
        check_space(self._here.path, wanted, way_out)

    def create(self, name: str) -> DirectFile:
        return self._here.create(name)

    def publish(self, file: DirectFile, shard: Shard, tick: Tick) -> None:
        """Read a shard back, put it, see that it is there, and remove it here."""
        here = self._here
        here.publish(file, shard, tick)
        if not here.holds(shard, tick):
            raise OutputError(f"{here.path}/{shard.file}: the disk gives back other bytes than were written to it")
        watch = fsspec.Callback(hooks={"tick": lambda size, value: tick(0)})
        local = here.path / shard.file
        try:
            put = partial(self._fs.put_file, str(local), callback=watch)
            self._write(shard.file, shard.size, put, _once_more(tick))
        except BaseException:
            with contextlib.suppress(OutputError):  # where a file is seen while it is written
                self.remove([shard.file])
            raise
        size = self.files().get(shard.file)
        if size != shard.size:
            raise OutputError(
                f"{self.address}/{shard.file}: {size} bytes are there, {shard.size} were sent; does another run write "
                "there? Run the same command with --resume"
            )
        local.unlink()

    def read(self, name: str) -> bytes:
        most = limits.MANIFEST_BYTES + 1  # what is longer is refused where it is parsed
        return self._attempt("read", name, lambda path: bytes(self._fs.cat_file(path, start=0, end=most)))

    def holds(self, shard: Shard, tick: Tick) -> bool:
        """Whether the shard has the digest: it is fetched, block by block."""
        hasher = blake3()
        for start in range(0, shard.size, _BLOCK):
            place = {"start": start, "end": min(start + _BLOCK, shard.size)}
            more = _BLOCK / limits.WHOLE_PIECE_SPEED
            hasher.update(self._attempt("read", shard.file, partial(self._fs.cat_file, **place), more, tick))
            tick(0)
        return hasher.hexdigest() == shard.blake3

    def put(self, name: str, data: bytes) -> None:
        self._write(name, len(data), lambda path: self._fs.pipe_file(path, data))

    def remove(self, names: Iterable[str]) -> None:
        there = self.files()
        for name in there.keys() & set(names):
            self._attempt("deleted", name, self._fs.rm_file)

    def remove_temporaries(self, ranks: Collection[int] | None) -> None:
        pass  # what a killed run has left is in its own host's TMPDIR

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(path.rstrip("/"), detail=True))
        except FileNotFoundError:
            return []

    def _write(self, name: str, size: int, call: Callable[[str], object], tick: Tick = lambda n: None) -> None:
        self._attempt("written", name, call, size / limits.PUT_SPEED, tick)

    def _attempt(
        self, what: str, name: str, call: Callable[[str], T], more: float = 0.0, tick: Tick = lambda n: None
    ) -> T:
        """A call of a store's driver, whose errors are its own: an OutputError says what could not be done.

        more: the seconds beyond limits.DRIVER_SECONDS that it may take. tick: as `publish` has it.
        """
        path = f"{self._root}/{name}"
        try:
            return within(limits.DRIVER_SECONDS + more, lambda: call(path), lambda: tick(0))
        except Cancelled:
            raise
        except Exception as error:
            raise OutputError(
                f"{self.address}/{name}".rstrip("/") + f": cannot be {what}: {_text(error)}; see to the address, the "
                "credentials and the network, then run the same command with --resume"
            ) from error


def _once_more(tick: Tick) -> Tick:
    """Raises where `tick` does a second time: between the two a driver that asks, too, ends its call by itself."""
    told: list[Cancelled] = []

    def later(nbytes: int) -> None:
        try:
            tick(nbytes)
        except Cancelled as end:
            if told:
                raise
            told.append(end)

    return later


def _text(error: BaseException) -> str:
    """A driver's message; some say nothing."""
    return one_line(error).rstrip(".") or type(error).__name__
