"""The one sink and the one error boundary: data on stdout, progress and warnings on stderr, an exit code per error."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

from reshard.cli.streams import SafeLines, open_streams, say, show_traceback, terminal, written
from reshard.errors import OutputError, ReshardError, as_reshard_error
from reshard.safe_text import redacted, safe_line

_INTERRUPTED = 130
_WHOLE = 10_000  # columns: no cell is cut to fit, a narrow terminal wraps the line
_LINE_SECONDS = 5.0  # without a terminal: how often a line of progress is written at most


def run(call: Callable[[], object]) -> None:
    """What a process of a program does: its streams, and the last boundary, for what no command's own has."""
    open_streams()
    try:
        call()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(_INTERRUPTED)
    except Exception as error:  # of options, --help
        if "--debug" in sys.argv:
            show_traceback(error)
        say(f"error: {as_reshard_error(error)}")
        sys.exit(1)


@dataclass(frozen=True)
class Table:
    """Rows under titles; where a title begins with >, the column's cells stand right."""

    columns: Sequence[str]
    rows: Iterable[Sequence[str]]


class Output:
    """What a command prints with, and where its errors end."""

    def __init__(self, form: str, *, quiet: bool, debug: bool) -> None:
        self.is_json = form == "json"
        self._quiet = quiet or self.is_json
        self._debug = debug
        self._speaks = True
        self._who = self._kept = ""

    def is_process(self, number: int, size: int, host: str, kept: str = "") -> None:
        """One of several that do the same: only the first one speaks, and errors say whose they are.

        kept: what is left where it is told to end, and the way on.
        """
        self._speaks = number == 0
        self._quiet = self._quiet or not self._speaks
        self._who, self._kept = f"process {number} of {size} ({host}): ", kept

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """An error becomes one line on stderr and its exit code; with json a document on stdout too."""
        try:
            yield
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            say(f"{self._who}interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        except SystemExit:  # SIGTERM, which torchrun sends when another process has died
            if self._who:
                end = f"told to end, as torchrun does when another process has ended{self._kept}"
                say(f"error: {self._who}{end}")
            raise
        except BaseException as raised:
            error = as_reshard_error(raised)
            message = self.error(error)
            if self.is_json:
                with contextlib.suppress(OutputError):  # stdout itself may be what failed
                    self.json({"error": {"kind": type(error).__name__, "message": message}})
            raise typer.Exit(error.exit_code) from None

    def error(self, error: ReshardError, of: str = "") -> str:
        """An error's line on stderr, which is returned; with --debug its traceback before it.

        of: which of several inputs it is about; the line names it.
        """
        if self._debug:
            show_traceback(error)
        message = " ".join(str(error).split())
        about = f"{of}: " if of and safe_line(of) not in message else ""
        say(f"error: {self._who}{about}{message}")
        return message

    def document(self, document: Any, human: Callable[[], "Iterable[str | Table | Text]"]) -> None:
        """What a command has to say: a dataclass or an object of JSON, or the lines and tables that people read."""
        if self.is_json:
            self.json(document)
            return
        for part in human():
            if isinstance(part, str):
                self.text(part)
            elif self._speaks:
                _show(part)

    def json(self, document: Any) -> None:
        """One JSON document; of what JSON does not know, its attributes. Names in it are data: escaped, and whole."""
        text = redacted(json.dumps(document, indent=2, default=vars))
        self.escaped(text.replace("\x7f", r"\u007f").replace("##", r"#\u0023"))  # as safe_line: JSON's escapes, no more

    def text(self, line: str) -> None:
        """A line of data, made safe to show."""
        self.escaped(safe_line(line))

    def escaped(self, text: str) -> None:
        """Lines of data in which other people's text is made safe already, by the rules of their form."""
        if self._speaks:
            with written():
                print(text)  # noqa: T201

    def warn(self, line: str) -> None:
        """A warning."""
        if self._speaks:
            say(f"warning: {line}")

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A callable that takes the bytes done since its last call; safe to use from several threads."""
        if self._quiet:
            yield lambda nbytes: None
        elif sys.stderr.isatty():
            with _bar(what, total) as tick:
                yield tick
        else:
            lines = _Lines(what, total)
            yield lines
            lines.finish()


def _show(part: "Table | Text") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    class Stdout(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the program
            raise

    # Without a height rich makes a terminal that is called dumb 80 columns wide.
    console = Stdout(width=_WHOLE, height=1, highlight=False)
    if not isinstance(part, Table):
        with written():
            console.print(part)
        return
    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in part.columns:
        grid.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left", no_wrap=True)
    for row in part.rows:
        grid.add_row(*(Text(safe_line(cell)) for cell in row))  # a str would be read as rich's markup
    with written():
        console.print(grid)


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=Console(file=terminal()), transient=True) as bar,
        contextlib.redirect_stderr(SafeLines(sys.stderr)),  # rich's, which writes above the bar
    ):
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)


class _Lines:
    """Progress where there is no terminal: a line now and then, and one at the end."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = self._shown = time.monotonic()

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now >= self._shown + _LINE_SECONDS:
            self._shown = now
            share = self._done / self._total if self._total else 1.0
            self._print(f"{share:.0%} of {size_text(self._total)}, {self._rate(now)}")

    def finish(self) -> None:
        now = time.monotonic()
        self._print(f"{size_text(self._done)} in {now - self._start:.2f} s, {self._rate(now)}")

    def _rate(self, now: float) -> str:
        return f"{size_text(int(self._done / max(now - self._start, 1e-9)))}/s"

    def _print(self, text: str) -> None:
        say(f"{self._what}: {text}")


def size_text(nbytes: int) -> str:
    """Bytes in the largest binary unit that gives at least one."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.2f} {unit}"
