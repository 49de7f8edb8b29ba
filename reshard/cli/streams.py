"""Standard streams that never stand in the way: closed ones, full ones, readers that have gone, text of libraries."""

import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from reshard.errors import OutputError
from reshard.safe_text import safe_line

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def open_streams() -> None:
    """For the whole process: what is closed leads nowhere, and what anything writes to stderr is safe to show.

    A descriptor that stays closed would be given to the next file that is opened, and a line for people be written
    into a shard.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # None where they were closed. A name that the locale cannot write is spelt out.
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), errors="backslashreplace")
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = _Unfailing(2, "w", closefd=False)
    raw.owner = sys.stderr
    encoding = sys.stderr.encoding if sys.stderr is not None else None
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
    sys.stderr = SafeLines(text)


class _Unfailing(io.FileIO):
    """What cannot be written is lost: a full disk under a log is no reason to fail."""

    owner: object  # a stream that would close the descriptor, were it dropped

    def write(self, data: "ReadableBuffer") -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


class SafeLines(io.TextIOBase):
    """A text stream that writes each line to another one, made safe to show. Safe to use from several threads."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._begun = ""
        self._lock = threading.Lock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self.stream.write(f"{safe_line(line)}\n")
        return len(text)

    def flush(self) -> None:
        with self._lock:
            begun, self._begun = self._begun, ""
            self.stream.write(safe_line(begun))
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True


def terminal() -> TextIO:
    """Stderr for what moves a cursor on purpose."""
    return sys.stderr.stream if isinstance(sys.stderr, SafeLines) else sys.stderr


def say(line: str) -> None:
    """A line on stderr, made safe to show."""
    print(safe_line(line), file=sys.stderr)  # noqa: T201


def show_traceback(error: BaseException) -> None:
    """With what libraries say in it made safe to show, line by line."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        say(line)


@contextlib.contextmanager
def written() -> Iterator[None]:
    """What is printed inside stands on stdout, or the command fails. A reader that has gone (`| head`) is no fault."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again when it ends
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"stdout: {error.strerror}: what was to be written there is lost") from error
