"""Files elsewhere as a source: each byte that is wanted is fetched once, by several threads, and staged on disk.

Why a disk and not memory: a rank's columns of a row-parallel weight lie in every row, so all of it is wanted until the
last rank is written. Bounded memory would mean to fetch it again and again; a file's pages the kernel can drop. The
stage is a sparse file for each remote one, in the folder that TMPDIR names, with its bytes in the same places. It has
no name, so that nothing is left of it however the process ends.

Why not fsspec's caches: they fetch blocks, and so parts of tensors that nobody asked for.
"""

import bisect
import contextlib
import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Protocol, TypeVar

from reshard import limits
from reshard.errors import SourceError, SpaceError
from reshard.source.base import MISSING, Origin, Range, Source, merged
from reshard.source.fetchers import Fetchers, result_of
from reshard.source.retry import Backoff, Fault, Notify, RetryPolicy
from reshard.source.watched import watched
from reshard.tensors.memory import Bytes
from reshard.tensors.rows import RowReader
from reshard.workers import interruptible

_CONNECTIONS = 8
_REQUEST_BYTES = 8 << 20

_T = TypeVar("_T")


class Remote(Protocol):
    """A listing of files elsewhere, of one state of them. Safe to use from several threads."""

    @property
    def origin(self) -> Origin:
        """Where this is, for the manifest."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every file's name and size in bytes."""

    @property
    def folders(self) -> Collection[str]:
        """Of the folders there, those that are called as sets of several parts are, if that is known."""

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in order, in pieces of any size. May end early.

        Raises Fault for what may pass, SourceError for what does not: a file that has changed, too.
        """

    def seconds(self, size: int) -> float:
        """How long a fetch of so many bytes may show less than limits.PROGRESS_BYTES of them, again and again."""


@dataclass(frozen=True)
class _Piece:
    """A range of a file that is fetched in one go."""

    start: int
    stop: int
    done: Future[None]


@dataclass(eq=False)
class Stage:
    """A file's stage and the pieces that were asked for: disjoint, in order."""

    stream: IO[bytes]
    reader: RowReader
    pieces: list[_Piece] = field(default_factory=list)

    def read(self, out: Bytes, start: int, stride: int) -> None:
        """Rows that are there. Raises SourceError."""
        with _stage_errors():
            self.reader.read(out, start, stride)

    def write(self, at: int, chunk: bytes) -> None:
        """Put bytes where they belong. Raises SpaceError, SourceError."""
        rest = memoryview(chunk)
        with _stage_errors():
            while rest:
                done = os.pwrite(self.stream.fileno(), rest, at)
                at, rest = at + done, rest[done:]


class StagedSource(Source):
    """Files elsewhere as a source. `find` lists them, or raises Fault or SourceError.

    notify: takes a line for each wait after a fault.
    """

    def __init__(
        self, name: str, find: Callable[[], Remote], policy: RetryPolicy, notify: Notify, index: str | None = None
    ) -> None:
        self.index = index
        self._backoff = Backoff(policy, notify)
        self._fetchers = Fetchers(_CONNECTIONS)
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._read: dict[Range, bytes] = {}
        self._remote = self._waited(lambda: self._fetchers.now(lambda: self._persist(find, name)))
        self.origin = self._remote.origin

    def files(self) -> Mapping[str, int]:
        return self._remote.sizes

    def not_files(self) -> Collection[str]:
        return self._remote.folders

    def read(self, file: str, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop), kept: what was read once stays what it was."""
        key = (file, start, stop)
        if key not in self._read:
            self._check_within(file, stop)
            out = bytearray(max(0, stop - start))

            def put(at: int, chunk: bytes) -> None:
                out[at - start : at - start + len(chunk)] = chunk

            self._waited(lambda: self._fetchers.now(lambda: self._fetch(file, start, stop, put)))
            self._read[key] = bytes(out)
        return self._read[key]

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        """From the stage, when they are there. Raises Cancelled if they were not waited for."""
        rows, width = out.shape
        if not out.size:
            return
        stop = start + (rows - 1) * stride + width
        self._check_within(file, stop)

        def wait() -> None:
            stage, pieces = self._claim(file, start, stop)
            for piece in pieces:
                result_of(piece.done)
            stage.read(out, start, stride)

        self._waited(wait)

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Fetch them in the background, each byte that is not asked for yet.

        Raises SpaceError where the stage has no room for them.
        """
        wanted = list(merged(ranges))
        with self._lock:
            missing = sum(b - a for file, start, stop in wanted for a, b in self._gaps(file, start, stop))
        _check_space(missing)
        for file, _, stop in wanted:
            self._check_within(file, stop)
        self._waited(lambda: [self._claim(*piece) for piece in wanted])

    def cancel(self) -> None:
        """Make calls that wait raise Cancelled; what is being fetched is dropped."""
        self._backoff.stop()
        self._fetchers.cancel()

    def close(self) -> None:
        """Drop what is being fetched; a stage goes with the last thread that reads it."""
        self.cancel()
        self._stages.clear()

    def _waited(self, call: Callable[[], _T]) -> _T:
        """Call what waits for threads or locks a lock of theirs: a Ctrl-C must not leave it locked."""
        if threading.current_thread() is threading.main_thread():
            return interruptible(call, self.cancel)
        return call()

    def _claim(self, file: str, start: int, stop: int) -> tuple[Stage, list[_Piece]]:
        """The pieces that cover a range; those that nobody asked for yet are begun."""
        with self._lock:
            if file not in self._stages:
                self._stages[file] = _stage(file, self._remote.sizes[file])
            stage = self._stages[file]
            for first, last in list(self._gaps(file, start, stop)):
                for at in range(first, last, _REQUEST_BYTES):
                    end = min(at + _REQUEST_BYTES, last)
                    done = self._fetchers.soon(partial(self._fetch, file, at, end, stage.write))
                    bisect.insort(stage.pieces, _Piece(at, end, done), key=_start)
            return stage, list(_overlapping(stage.pieces, start, stop))

    def _gaps(self, file: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that no piece covers."""
        stage = self._stages.get(file)
        at = start
        for piece in _overlapping(stage.pieces, start, stop) if stage else ():
            if at < piece.start:
                yield at, piece.start
            at = piece.stop
        if at < stop:
            yield at, stop

    def _check_within(self, file: str, stop: int) -> None:
        size = self._remote.sizes.get(file)
        if size is None or stop > size:
            there = MISSING if size is None else f"{size} bytes, expected {stop} or more"
            raise SourceError(f"{self.origin.name}: {file}: {there}")

    def _fetch(self, file: str, start: int, stop: int, put: Callable[[int, bytes], None]) -> None:
        """Fetch a range; after a fault, from where it broke off, and less at a time."""
        at, failures = start, 0
        while at < stop:
            before, end = at, min(stop, at + max(limits.PROGRESS_BYTES, _REQUEST_BYTES >> 3 * failures))
            self._backoff.check()
            try:
                fetch = partial(self._remote.fetch, file, at, end)
                for chunk in watched(fetch, self._remote.seconds(end - at)):
                    self._backoff.check()
                    if len(chunk) > end - at:
                        longer = f"the answer is longer than the {end - before} bytes asked for"
                        raise SourceError(f"{self.origin.name}: {file}: {longer}")
                    put(at, chunk)
                    at += len(chunk)
                if at < end:
                    raise Fault(f"the answer ends at byte {at}, expected {end}")
            except Fault as fault:
                failures = 1 if at - before >= limits.PROGRESS_BYTES else failures + 1
                self._backoff.after(fault, failures, f"{self.origin.name}: {file}")

    def _persist(self, attempt: Callable[[], _T], what: str) -> _T:
        failures = 0
        while True:
            try:
                return attempt()
            except Fault as fault:
                failures += 1
                self._backoff.after(fault, failures, what)


def _stage(file: str, size: int) -> Stage:
    with _stage_errors(), contextlib.ExitStack() as undo:
        stream = undo.enter_context(tempfile.TemporaryFile(buffering=0, dir=_folder()))
        os.truncate(stream.fileno(), size)
        stage = Stage(stream, RowReader(stream, file))
        undo.pop_all()
    weakref.finalize(stage, stream.close).atexit = False  # not before the last thread that writes to it has gone
    return stage


def _check_space(wanted: int) -> None:
    with _stage_errors():
        folder = os.statvfs(_folder())
    free = folder.f_bavail * folder.f_frsize
    if wanted > free:
        raise SpaceError(
            f"{_folder()}: {wanted:,} bytes are to be staged there, {free:,} are free; let TMPDIR name a folder "
            "with more room"
        )


@contextlib.contextmanager
def _stage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(
                f"{_folder()}: the disk is full ({error.strerror}); let TMPDIR name a folder with more room"
            ) from error
        raise SourceError(
            f"{_folder()}: what is fetched cannot be staged there: {error.strerror}; check TMPDIR"
        ) from error


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
