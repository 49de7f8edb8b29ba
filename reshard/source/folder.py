"""A folder on this host: files mapped into memory, read only where a view is taken."""

import os
import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from reshard.errors import SourceError
from reshard.source.base import Bytes, Origin, Range, merged
from reshard.source.mapped import MappedFile

_WAY_OUT = "see to its owner, its mode and its disk"


class FolderSource:
    """The files directly in a folder. Symlinks may not lead out of it, but into the blobs of a Hugging Face cache."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SourceError(f"{path}: no such folder; give the one that holds the checkpoint")
        if not path.is_dir():
            raise SourceError(f"{path}: not a folder; give the folder that holds the checkpoint's files")
        self.path = path
        self._maps: dict[str, MappedFile] = {}
        self._lock = threading.Lock()

    @property
    def origin(self) -> Origin:
        """The folder's name."""
        return Origin("folder", self.path.resolve().name)

    @cached_property
    def _files(self) -> dict[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise SourceError(f"{error.filename or self.path}: {error.strerror}") from error

    def files(self) -> Mapping[str, int]:
        """Every file's name and size in bytes."""
        return self._files

    def read(self, file: str, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop)."""
        try:
            with self._inside(file).open("rb", buffering=0) as stream:
                stream.seek(start)
                chunks = []
                while start < stop and (chunk := stream.read(stop - start)):
                    chunks.append(chunk)
                    start += len(chunk)
        except OSError as error:
            raise SourceError(f"{self.path / file}: cannot be read: {error.strerror}; {_WAY_OUT}") from error
        if start < stop:
            raise SourceError(
                f"{self.path / file}: ends at byte {start}, {stop} are wanted; it changed or is cut short"
            )
        return b"".join(chunks)

    def view(self, file: str, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the mapped file, its pages brought in."""
        return (self._maps.get(file) or self._map(file)).view(start, stop)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Ask the kernel to read ahead."""
        for file, start, stop in merged(ranges):
            try:
                descriptor = os.open(self._inside(file), os.O_RDONLY)
            except OSError:
                continue  # only a hint: the read that follows reports it
            try:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def cancel(self) -> None:
        """Nothing here waits for long."""

    def close(self) -> None:
        """Drop the maps; each is unmapped with its last view."""
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self, file: str) -> MappedFile:
        with self._lock:
            if file not in self._maps:
                try:
                    with self._inside(file).open("rb") as stream:
                        self._maps[file] = MappedFile(stream.fileno(), str(self.path / file))
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) else error
                    raise SourceError(f"{self.path / file}: cannot be read: {reason}; {_WAY_OUT}") from error
            return self._maps[file]

    def _inside(self, file: str) -> Path:
        """The file's path, refused if it leads out of the folder."""
        path = self.path / file
        root, target = self.path.resolve(), path.resolve()
        if Path(file).name != file or file in {"", ".", ".."}:
            raise SourceError(f"{self.path}: {file!r} is no plain file name in this folder")
        if target.parent == root:
            return path
        # Hugging Face cache: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
        if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
            return path
        raise SourceError(
            f"{path}: a link to {target}, outside the folder; give the folder that holds the files themselves"
        )
