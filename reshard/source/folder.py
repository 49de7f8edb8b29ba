"""A folder on this host: of its files only what is asked for is read."""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from reshard.errors import SourceError
from reshard.regular import Identity, Opened, unfollowed, unreadable, what_stands_there
from reshard.source.base import MISSING, Origin, Source
from reshard.source.weights import SNAPSHOTS, WEIGHTS_ENDING
from reshard.tensors.memory import Bytes
from reshard.tensors.rows import RowReader

_PLACES = ("*", f"{SNAPSHOTS}/*", f"models--*/{SNAPSHOTS}/*")


class FolderSource(Source):
    """The files directly in a folder, symbolic links followed wherever they lead.

    A file is opened once: header and data come from one descriptor.
    """

    def __init__(self, path: Path, index: str | None = None) -> None:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            if error.errno == errno.ENOENT and not os.path.islink(path):
                raise SourceError(f"{path}: no such folder; give the one that holds the checkpoint") from error
            raise SourceError(unreadable(path, error, "check its owner, permissions and disk")) from error
        if not is_folder:
            raise SourceError(f"{path}: not a folder; give the folder that holds the checkpoint's files")
        self.path = path
        self.index = index
        self.origin = Origin("folder", path.resolve().name)
        self._opened: dict[str, Opened] = {}
        self._released: dict[str, Identity] = {}
        self._readers: dict[str, RowReader] = {}
        self._lock = threading.Lock()

    @cached_property
    def _listed(self) -> tuple[dict[str, int], dict[str, str]]:
        """The files and their sizes; what else has a name here, and what it is."""
        files, others = {}, {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    try:
                        found = entry.stat()
                    except OSError as error:
                        if entry.is_symlink() or error.errno != errno.ENOENT:  # else it is gone since it was listed
                            others[entry.name] = unfollowed(self.path / entry.name, error)
                        continue
                    if what := what_stands_there(found.st_mode):
                        others[entry.name] = what
                    else:
                        files[entry.name] = found.st_size
        except OSError as error:
            raise SourceError(f"{error.filename or self.path}: {error.strerror}") from error
        return files, others

    def files(self) -> Mapping[str, int]:
        return self._listed[0]

    def not_files(self) -> Collection[str]:
        return self._listed[1].keys()

    def folders(self) -> Collection[str]:
        """Those that hold weights directly, and those in a Hugging Face cache."""
        found = (path for place in _PLACES for path in self.path.glob(f"{place}/*{WEIGHTS_ENDING}"))
        return sorted({str(path.parent.relative_to(self.path)) for path in found})

    def absent(self, file: str) -> str:
        return self._listed[1].get(file, MISSING)

    def read(self, file: str, start: int, stop: int) -> bytes:
        with self._named(file):
            data = self._open(file).read(start, stop)
        if len(data) < stop - start:
            raise SourceError(
                f"{self.path / file}: ends at byte {start + len(data)}, expected {stop}; it changed or is cut short"
            )
        return data

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        with self._named(file):
            (self._readers.get(file) or self._reader(file)).read(out, start, stride, once)

    def release(self, file: str) -> None:
        with self._lock:
            if file not in self._readers and (released := self._opened.pop(file, None)):
                self._released[file] = released.identity

    def check_unchanged(self) -> None:
        with self._lock:
            opened = dict(self._opened)
        for file, one in opened.items():
            if difference := one.difference():
                raise SourceError(self._changed(file, difference))

    def close(self) -> None:
        """Each file is closed when the last thread that reads it has done."""
        self._readers.clear()
        self._opened.clear()

    def _reader(self, file: str) -> RowReader:
        opened = self._open(file)
        with self._lock:
            return self._readers.setdefault(file, RowReader(opened, str(self.path / file)))

    def _open(self, file: str) -> Opened:
        """The file, opened once."""
        if Path(file).name != file or file in {"", ".", ".."}:
            raise SourceError(f"{self.path}: {file!r} is no plain file name in this folder")
        with self._lock, self._named(file):
            if file not in self._opened:
                opened = Opened(self.path / file)
                if self._released.get(file, opened.identity) != opened.identity:
                    raise SourceError(self._changed(file, "is no longer the file whose header was read"))
                self._opened[file] = opened
            return self._opened[file]

    def _changed(self, file: str, difference: str) -> str:
        return (
            f"{self.path / file}: {difference}; nothing that was made of it is kept: start again when nothing writes "
            "there any more"
        )

    @contextlib.contextmanager
    def _named(self, file: str) -> Iterator[None]:
        """What the system says of a file, with its path and the way out."""
        try:
            yield
        except OSError as error:
            raise SourceError(unreadable(self.path / file, error, "check its owner, permissions and disk")) from error
