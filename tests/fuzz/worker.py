"""A process that makes cases, runs their commands, judges each; its parent kills it where a command does not end."""

import contextlib
import functools
import gc
import io
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import typer

from tests.fuzz.cases import Case
from tests.fuzz.runs import Run
from tests.fuzz.subjects import SUBJECTS, Made, make

MAX_BYTES = 500_000_000
MAX_OUTPUT = 200_000  # characters
_CODES = {0, 1, 2, 3}
_LINE = re.compile(r"(error|warning): .")


@dataclass
class Verdict:
    """How a command ended. proven: it wrote or loaded something, which is right; faults: what must not be."""

    line: str
    code: int | None
    proven: bool
    seconds: float
    peak: int
    faults: list[str] = field(default_factory=list)
    said: str = ""


Maker = Callable[[int, int, Callable[[str], Made], Path], Case]


def serve(pipe: Connection, make_case: Maker, seed: int, base: Path, kept: bool = False) -> None:
    """Take numbers until there are none. Says when each command begins, then its verdict; last the number's end.

    kept: leave the cases' folders for a person to look at.
    """
    _prepare(base)
    made = functools.cache(lambda name: make(base / name, next(s for s in SUBJECTS if s.name == name)))
    pipe.send(("ready", None))
    while (number := pipe.recv()) is not None:
        folder = base / f"case-{number}"
        folder.mkdir()
        case = make_case(seed, number, made, folder)
        pipe.send(("case", case.said))
        for verdict in judged(case, lambda run: pipe.send(("run", run.line))):
            pipe.send(("verdict", verdict))
        if not kept:
            shutil.rmtree(folder)
        pipe.send(("end", None))


def _prepare(base: Path) -> None:
    """Import what is used, so that no case pays for it; waits and fsync cost time and change nothing that is judged."""
    import reshard.cli.main
    import reshard.source.open
    import reshard.source.retry
    import tests.fuzz.imported  # noqa: F401

    os.environ.update(HF_HOME=str(base / "home"), HF_HUB_DISABLE_TELEMETRY="1", NO_COLOR="1", COLUMNS="1000")
    patient = functools.partial(reshard.source.retry.RetryPolicy, sleep=lambda seconds: None)
    for owner, name, replacement in (
        (reshard.source.open, "RetryPolicy", patient),
        (reshard.cli.main, "app", typer.main.get_command(reshard.cli.main.app)),  # made once, not for each command
        (os, "fsync", lambda descriptor: None),
    ):
        setattr(owner, name, replacement)
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    gc.collect()
    gc.freeze()
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + (8 << 30), here + (8 << 30)))


def judged(case: Case, begins: Callable[[Run], None]) -> Iterator[Verdict]:
    """A verdict for each of a case's commands. begins: called before each."""
    with case.around as place:
        for run in (run.at(place) for run in case.runs):
            begins(run)
            yield _judge(run)
    gc.collect()


def _judge(run: Run) -> Verdict:
    before, start = _reset_peak(), time.monotonic()
    with _captured() as captured:
        code, error = _call(run)
    seconds, peak = time.monotonic() - start, _memory("VmHWM") - before
    out, err = captured()
    verdict = Verdict(run.line, code, False, seconds, peak, [], (out + err)[-3000:])
    faults = verdict.faults
    if error is not None:
        faults.append(f"an exception: {error}")
    elif code not in _CODES:
        faults.append(f"exit code {code}")
    if peak > MAX_BYTES:
        faults.append(f"{peak / 1e6:.0f} MB more than at the start")
    faults += wrong_output(out, err, code, run.form)
    if code == 0 and not faults:
        try:
            verdict.proven = run.proof()
        except Exception as wrong:
            where = traceback.extract_tb(wrong.__traceback__)[-1]
            faults.append(f"ended with 0 and is not right: {type(wrong).__name__}: {str(wrong)[:500]} ({where.name})")
    return verdict


def _call(run: Run) -> tuple[int | None, str | None]:
    """The exit code, or the exception that got out."""
    from reshard.cli.main import main
    from reshard.cli.signals import ENDING
    from reshard.errors import ReshardError

    arguments, handlers = sys.argv, {number: signal.getsignal(number) for number in ENDING}
    try:
        if run.call is not None:
            try:
                run.call()
            except ReshardError as error:
                sys.stderr.write(f"error: {error}\n")
                return error.exit_code, None
            return 0, None
        sys.argv = ["reshard", *run.arguments]
        main()
    except SystemExit as end:
        return (end.code if isinstance(end.code, int) else 0 if end.code is None else 1), None
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    finally:
        sys.argv = arguments
        gc.enable()  # what `main` sets for a program that ends
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0, None


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], tuple[str, str]]]:
    """Descriptors 1 and 2 into files: also what threads and C code say. What it yields reads them after the block."""
    files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    saved = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    for file, number in zip(files, (1, 2), strict=True):
        os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        for number in (1, 2)
    )
    texts: list[str] = []
    try:
        yield lambda: (texts[0], texts[1])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for number, old, file in zip((1, 2), saved, files, strict=True):
            os.dup2(old, number)
            os.close(old)
            file.seek(0)
            texts.append(file.read(10_000_000).decode("utf-8", "surrogateescape"))
            file.close()


def wrong_output(out: str, err: str, code: int | None, form: str = "human") -> list[str]:
    """What no command may say, whatever it was given. form: what stdout carries; JSON has names whole."""
    faults = []
    faults += [f"it says {word!r}" for word in ("Traceback", "unforeseen", "not enough memory") if word in out + err]
    for name, text in (("stdout", out), ("stderr", err)):
        raw = sorted({c for c in text if not c.isprintable() and c != "\n"})
        if raw:
            faults.append(f"{name} has {', '.join(ascii(c) for c in raw[:5])}")
        if len(text) > MAX_OUTPUT and not (form == "json" and text is out):
            faults.append(f"{name} has {len(text):,} characters")
        if form != "github" and any(line.lstrip().startswith("::") for line in text.splitlines()):
            faults.append(f"{name} has a line that a workflow takes for a command")
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) > 1 or (code in (1, 2) and not errors):
        faults.append(f"{len(errors)} error lines")
    faults += [f"stderr has the line {line[:200]!r}" for line in lines if not _LINE.match(line)][:1]
    if "user:secret@" in out + err:
        faults.append("a password is repeated")
    return faults


def _memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")
