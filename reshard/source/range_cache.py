"""Files elsewhere as a source: each byte that is wanted is fetched once, by several threads, and staged on disk.

Why a disk and not memory: a rank's columns of a row-parallel weight lie in every row, so all of it is wanted until the
last rank is written. Bounded memory would mean to fetch it again and again; a file's pages the kernel can drop. The
stage is a sparse file for each remote one, in the folder that TMPDIR names, with its bytes in the same places. It has
no name, so that nothing is left of it however the process ends.
"""

import bisect
import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import IO, Self, TypeVar

import numpy as np

from reshard.errors import SourceError, SpaceError
from reshard.interruptible import interruptible
from reshard.source.base import MISSING, Bytes, Cancelled, Origin, Range, merged
from reshard.source.retry import Fault, Notify, Patience, Pauses, Remote
from reshard.tensors.mapped import MappedFile

_CONNECTIONS = 8
_REQUEST_BYTES = 8 << 20
_PROGRESS_BYTES = 1 << 16  # a try that brought less has failed

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Piece:
    """A range of a file that is fetched in one go."""

    start: int
    stop: int
    done: Future[None]


@dataclass
class _Staged:
    """A file's stage and the pieces that were asked for: disjoint, in order."""

    stream: IO[bytes]
    mapped: MappedFile
    pieces: list[_Piece] = field(default_factory=list)


class StagedSource:
    """What a remote offers, as a source. `notify` takes a line for each wait after a fault."""

    def __init__(self, remote: Remote, patience: Patience, notify: Notify, index: str | None = None) -> None:
        self.index = index
        self._remote = remote
        self._pauses = Pauses(patience, notify)
        self._pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._staged: dict[str, _Staged] = {}
        self._read: dict[Range, bytes] = {}
        self._files  # noqa: B018 - a source that is not there is an error here

    @property
    def origin(self) -> Origin:
        """Where the remote says that it is."""
        return self._remote.origin

    @cached_property
    def _files(self) -> Mapping[str, int]:
        return self._waited(lambda: self._persist(self._remote.sizes, self.origin.name))

    def files(self) -> Mapping[str, int]:
        """Every file's name and size in bytes, listed once."""
        return self._files

    def folders(self) -> Collection[str]:
        """Folders within are not listed."""
        return ()

    def broken_links(self) -> Collection[str]:
        """Links are not listed."""
        return ()

    def absent(self, file: str) -> str:
        """It is not listed."""
        return MISSING

    def read(self, file: str, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop), kept: what was read once stays what it was."""
        key = (file, start, stop)
        if key not in self._read:
            self._check_within(file, stop)
            out = bytearray(max(0, stop - start))

            def put(at: int, chunk: bytes) -> None:
                out[at - start : at - start + len(chunk)] = chunk

            self._waited(lambda: self._fetch(file, start, stop, put))
            self._read[key] = bytes(out)
        return self._read[key]

    def view(self, file: str, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of the stage, when they are there. Raises Cancelled if they were not waited for."""
        if start >= stop:
            return np.empty(0, np.uint8)
        self._check_within(file, stop)
        return self._waited(lambda: self._view(file, start, stop))

    def _view(self, file: str, start: int, stop: int) -> Bytes:
        staged, pieces = self._claim(file, start, stop)
        for piece in pieces:
            try:
                piece.done.result()
            except CancelledError as error:
                raise Cancelled from error
        return staged.mapped.view(start, stop)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Fetch them in the background, each byte that is not asked for yet.

        Raises SpaceError where the stage has no room for them.
        """
        wanted = list(merged(ranges))
        with self._lock:
            missing = sum(b - a for file, start, stop in wanted for a, b in self._gaps(file, start, stop))
        self._check_space(missing)
        for file, _, stop in wanted:
            self._check_within(file, stop)
        self._waited(lambda: [self._claim(*piece) for piece in wanted])

    def release(self, file: str) -> None:
        """Nothing is held of it but what was read."""

    def check_unchanged(self) -> None:
        """Nothing is left to do: the remote compares each answer with the first one."""

    def cancel(self) -> None:
        """Make calls that wait raise Cancelled; what is being fetched is dropped."""
        self._pauses.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._remote.cancel()

    def close(self) -> None:
        """End what is being fetched; a stage goes with its last view."""
        self.cancel()
        self._pool.shutdown()
        for staged in self._staged.values():
            staged.stream.close()
        self._staged.clear()
        self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _waited(self, call: Callable[[], _T]) -> _T:
        """Call what waits for the pool's threads or locks a lock of theirs: a Ctrl-C must not leave it locked."""
        if threading.current_thread() is threading.main_thread():
            return interruptible(call, self.cancel)
        return call()

    def _claim(self, file: str, start: int, stop: int) -> tuple[_Staged, list[_Piece]]:
        """The pieces that cover a range; those that nobody asked for yet are begun."""
        with self._lock:
            self._pauses.check()
            staged = self._staged.get(file) or self._stage(file)
            for first, last in list(self._gaps(file, start, stop)):
                for at in range(first, last, _REQUEST_BYTES):
                    end = min(at + _REQUEST_BYTES, last)
                    done = self._pool.submit(self._fetch, file, at, end, _Writer(staged.stream.fileno()))
                    bisect.insort(staged.pieces, _Piece(at, end, done), key=_start)
            return staged, list(_overlapping(staged.pieces, start, stop))

    def _gaps(self, file: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that no piece covers."""
        staged = self._staged.get(file)
        at = start
        for piece in _overlapping(staged.pieces, start, stop) if staged else ():
            if at < piece.start:
                yield at, piece.start
            at = piece.stop
        if at < stop:
            yield at, stop

    def _stage(self, file: str) -> _Staged:
        try:
            with contextlib.ExitStack() as undo:
                stream = undo.enter_context(tempfile.TemporaryFile(buffering=0, dir=_folder()))
                os.truncate(stream.fileno(), self._files[file])
                staged = _Staged(stream, MappedFile(stream.fileno(), file))
                undo.pop_all()
        except OSError as error:
            raise _stage_error(error) from error
        self._staged[file] = staged
        return staged

    def _check_within(self, file: str, stop: int) -> None:
        size = self._files.get(file)
        if size is None or stop > size:
            there = "is not there" if size is None else f"{size} bytes, {stop} are wanted"
            raise SourceError(f"{self.origin.name}: {file}: {there}")

    def _check_space(self, wanted: int) -> None:
        try:
            folder = os.statvfs(_folder())
        except OSError as error:
            raise _stage_error(error) from error
        free = folder.f_bavail * folder.f_frsize
        if wanted > free:
            raise SpaceError(
                f"{_folder()}: {wanted:,} bytes are to be staged there, {free:,} are free; let TMPDIR name a folder "
                "with more room"
            )

    def _fetch(self, file: str, start: int, stop: int, put: Callable[[int, bytes], None]) -> None:
        """Fetch a range; after a fault, from where it broke off."""
        at, failures = start, 0
        while at < stop:
            before = at
            self._pauses.check()
            try:
                for chunk in self._remote.fetch(file, at, stop):
                    self._pauses.check()
                    if len(chunk) > stop - at:
                        raise SourceError(f"{file}: the answer is longer than the {stop - before} bytes asked for")
                    put(at, chunk)
                    at += len(chunk)
                if at < stop:
                    raise Fault(f"the answer ends at byte {at}, {stop} are wanted")
            except Fault as fault:
                failures = 1 if at - before >= _PROGRESS_BYTES else failures + 1
                self._pauses.after(fault, failures, f"{self.origin.name}: {file}")

    def _persist(self, attempt: Callable[[], _T], what: str) -> _T:
        failures = 0
        while True:
            try:
                return attempt()
            except Fault as fault:
                failures += 1
                self._pauses.after(fault, failures, what)


class _Writer:
    """Puts bytes where they belong in a stage."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, at: int, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                done = os.pwrite(self._descriptor, rest, at)
                at, rest = at + done, rest[done:]
        except OSError as error:
            raise _stage_error(error) from error


def _stage_error(error: OSError) -> SourceError | SpaceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"{_folder()}: the disk is full ({error.strerror}); let TMPDIR name a folder with more room")
    return SourceError(f"{_folder()}: what is fetched cannot be staged there: {error.strerror}; see to TMPDIR")


def _folder() -> str:
    """Where stages lie: in TMPDIR even if that is full or missing, when tempfile would silently choose another."""
    return os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - files there have no name


def _start(piece: _Piece) -> int:
    return piece.start


def _overlapping(pieces: list[_Piece], start: int, stop: int) -> Iterator[_Piece]:
    first = max(0, bisect.bisect_right(pieces, start, key=_start) - 1)
    for piece in pieces[first : bisect.bisect_left(pieces, stop, key=_start)]:
        if piece.stop > start:
            yield piece
