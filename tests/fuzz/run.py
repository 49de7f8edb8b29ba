"""Deals numbers to worker processes, kills one whose command does not end, and counts."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from tests.fuzz.cases import make_case
from tests.fuzz.worker import Maker, Verdict, serve
from tests.support import forks

MAX_SECONDS = 10.0
_START_SECONDS = 120.0
_PATIENCE = 4  # times as long at most, on a busy host


@dataclass
class Fault:
    """What must not be: in which case, what was done, what was run."""

    seed: int
    number: int
    said: str
    line: str
    what: str
    output: str = ""

    def __str__(self) -> str:
        tail = "".join(f"\n    | {line[:300]}" for line in self.output.splitlines()[-5:])
        return (
            f"mutation {self.number}: {self.what}\n  {self.said}\n  {self.line}{tail}\n"
            f"  replay: make fuzz SEED={self.seed} ONLY={self.number}"
        )


@dataclass
class Summary:
    """What came of all cases."""

    seed: int
    cases: int = 0
    seconds: float = 0.0
    commands: Counter[str] = field(default_factory=Counter)  # by what came of them
    slowest: tuple[float, str] = (0.0, "")
    peak: int = 0
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        counts = self.commands
        return (
            f"seed {self.seed}: {self.cases} mutations in {self.seconds:.0f} s, {counts.total()} commands: "
            f"{counts['refused']} refused, {counts['proven']} wrote or loaded what is proven right, "
            f"{counts['shown']} had nothing to prove; up to {self.peak / 1e6:.0f} MB, {self.slowest[0]:.1f} s "
            f"(mutation {self.slowest[1]}); {len(self.faults)} faults"
        )


class _Worker:
    """One process, and what it does just now."""

    def __init__(self, make: Maker, seed: int, base: Path, name: str, kept: bool) -> None:
        self._arguments = make, seed, base, name, kept
        self._starts = 0
        self.start()

    def start(self) -> None:
        make, seed, base, name, kept = self._arguments
        self._starts += 1
        folder = base / f"{name}-{self._starts}"
        folder.mkdir()
        context = forks.context()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, seed, folder, kept), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.said = ""
        self.begin("", _START_SECONDS)

    def begin(self, line: str, seconds: float) -> None:
        """It has so many seconds for this."""
        self.line, self.until = line, time.monotonic() + seconds
        self._last = self.until + _PATIENCE * seconds
        self._began = self._seen = self._processor_seconds()

    def is_starved(self, seconds: float) -> bool:
        """Whether it is the host that is busy: it has had less than its seconds of a processor, and gets some."""
        used, before = self._processor_seconds(), self._seen
        self._seen, self.until = used, self.until + seconds / 2
        return before < used < self._began + seconds and self.until < self._last

    def _processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(
    seed: int,
    numbers: Iterable[int],
    base: Path,
    workers: int,
    tell: Callable[[str], None] = lambda line: None,
    kept: bool = False,
    make: Maker = make_case,
    max_seconds: float = MAX_SECONDS,
) -> Summary:
    """Run cases. base: a folder for what is made; tell: takes each fault, and each command where kept."""
    summary, waiting, start = Summary(seed), iter(numbers), time.monotonic()
    pool = [_Worker(make, seed, base, f"worker-{i}", kept) for i in range(workers)]
    try:
        while pool:
            ready = wait([worker.pipe for worker in pool], 0.2)
            for worker in list(pool):
                if worker.pipe in ready:
                    _hear(worker, summary, tell, kept, max_seconds)
                elif time.monotonic() > worker.until and not worker.is_starved(max_seconds):
                    _fault(worker, summary, tell, f"it has not ended after {max_seconds:g} s")
                    worker.stop()
                    worker.start()
                if worker.number is None and worker.line == "idle":
                    worker.number = next(waiting, None)
                    if worker.number is None:
                        worker.stop()
                        pool.remove(worker)
                    else:
                        worker.begin("making the case", _START_SECONDS)
                        worker.pipe.send(worker.number)
    finally:
        for worker in pool:
            worker.stop()
    summary.seconds = time.monotonic() - start
    return summary


def _hear(worker: _Worker, summary: Summary, tell: Callable[[str], None], kept: bool, max_seconds: float) -> None:
    try:
        what, value = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        _fault(worker, summary, tell, f"the process died ({worker.process.exitcode})")
        worker.stop()
        worker.start()
        return
    if what in ("ready", "end"):
        summary.cases += what == "end"
        worker.number = None
        worker.begin("idle", float("inf"))
    elif what == "case":
        worker.said = value
        if kept:
            tell(value)
    elif what == "run":
        worker.begin(value, max_seconds)
    else:
        _count(worker, value, summary, tell)
        if kept:
            tell(f"  exit {value.code} in {value.seconds:.2f} s: {value.line}\n{_indented(value.said)}")
        worker.begin(worker.line, _START_SECONDS)


def _indented(text: str) -> str:
    return "\n".join(f"    {line[:300]}" for line in text.splitlines()[:12])


def _count(worker: _Worker, verdict: Verdict, summary: Summary, tell: Callable[[str], None]) -> None:
    for fault in verdict.faults:
        _fault(worker, summary, tell, fault, verdict.said)
    kind = "refused" if verdict.code else "proven" if verdict.proven else "shown"
    summary.commands["faulty" if verdict.faults else kind] += 1
    summary.slowest = max(summary.slowest, (verdict.seconds, f"{worker.number}: {verdict.line}"))
    summary.peak = max(summary.peak, verdict.peak)


def _fault(worker: _Worker, summary: Summary, tell: Callable[[str], None], what: str, output: str = "") -> None:
    number = -1 if worker.number is None else worker.number
    summary.faults.append(Fault(summary.seed, number, worker.said, worker.line, what, output))
    tell(str(summary.faults[-1]))
