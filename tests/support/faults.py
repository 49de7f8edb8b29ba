"""Faults at chosen steps of a split.

A step is one call that changes the output folder, with a label of its own that is the same in every run: what is
called, on which file (a temporary one is `name~`), the how-many-th time. `Steps` records them and kills the process
or raises an error at one. `Server` runs splits in processes of their own: started once, it forks one for each.
"""

import errno
import gc
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

TIMEOUT = 60.0
PAGE = 4096
STAGE_BYTES = 65536  # smaller than the writer's own, so that a small shard takes several writes
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")
KILL, INTERRUPT, STOP = "kill", "interrupt", "stop"


class Steps:
    """Records the steps below a folder and its parent. What happens at the step named `at`:

    KILL: the process dies; STOP: it does nothing more; INTERRUPT: it gets what Ctrl-C sends and goes on; an errno's
    name: the call fails so.
    """

    def __init__(self, folder: Path, at: str | None = None, action: str = KILL) -> None:
        self.labels: list[str] = []
        self._folder = folder.absolute()
        self._at, self._action = at, action
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def install(self, patch: Callable[[Any, str, Any], None] = setattr) -> None:
        """Put the steps in place of `os`'s own calls; `patch` may be pytest's, which undoes it."""
        real_open, real_pwrite, real_replace, real_unlink = os.open, os.pwrite, os.replace, os.unlink

        def step_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_CREAT:
                self._step("create", path)
            return real_open(path, flags, mode, dir_fd=dir_fd)

        def step_pwrite(descriptor: int, data: Any, offset: int) -> int:
            def half() -> None:
                done = memoryview(data)[: len(data) // 2 // PAGE * PAGE]
                if done:
                    real_pwrite(descriptor, done, offset)

            self._step("pwrite", _path_of(descriptor), half)
            return real_pwrite(descriptor, data, offset)

        def step_fsync(descriptor: int) -> None:
            # What fsync does is not seen by a process, only by a machine that lost its power: left out, for speed.
            self._step("fsync", _path_of(descriptor))

        def step_replace(source: Any, target: Any, **options: Any) -> None:
            self._step("replace", target)
            real_replace(source, target, **options)

        def step_unlink(path: Any, **options: Any) -> None:
            self._step("unlink", path)
            real_unlink(path, **options)

        for name, call in (
            ("open", step_open),
            ("pwrite", step_pwrite),
            ("fsync", step_fsync),
            ("replace", step_replace),
            ("unlink", step_unlink),
        ):
            patch(os, name, call)

    def _step(self, what: str, path: Any, before_death: Callable[[], None] = lambda: None) -> None:
        name = self._name(Path(os.fspath(path)).absolute())
        if name is None:
            return
        with self._lock:
            key = f"{what} {name}"
            self._counts[key] += 1
            label = f"{key} #{self._counts[key]}"
            self.labels.append(label)
        if label != self._at:
            return
        if self._action == KILL:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # another thread may be told of the signal first
        if self._action == STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()
        if self._action == INTERRUPT:
            os.kill(os.getpid(), signal.SIGINT)
            return
        raise OSError(getattr(errno, self._action), os.strerror(getattr(errno, self._action)), str(path))

    def _name(self, path: Path) -> str | None:
        """The file's name within the folder, `.` for the folder, `..` for its parent; None for any other."""
        if path == self._folder:
            return "."
        if path == self._folder.parent:
            return ".."
        if path.parent != self._folder:
            return None
        match = _TEMPORARY.fullmatch(path.name)
        return f"{match[1]}~" if match else path.name


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@dataclass(frozen=True)
class Job:
    """A split: what to cut, where to, how; and the step at which to fail."""

    source: Path
    out: Path
    cut: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    at: str | None = None
    action: str = KILL


@dataclass(frozen=True)
class Outcome:
    """How it ended. `signal`: what killed it; `error`: the class, exit code and message of what it raised."""

    signal: int
    labels: list[str]
    error: tuple[str, int, str] | None
    written: list[int]
    kept: list[int]
    missing: list[int]

    @property
    def killed(self) -> bool:
        return self.signal == signal.SIGKILL

    @property
    def done(self) -> bool:
        return self.signal == 0 and self.error is None


class Server:
    """A process that has imported what a split needs and forks one process for each job."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults"],
            cwd=ROOT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a process with threads must not fork
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, job: Job) -> None:
        """Begin a job; `outcome` waits for its end."""
        assert self._process.stdin is not None
        values = {**asdict(job), "source": str(job.source), "out": str(job.out)}
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        assert ready, f"a split had not ended after {TIMEOUT:.0f} s"
        line = self._process.stdout.readline()
        assert line, "the server of splits has died"
        values = json.loads(line)
        return Outcome(**{**values, "error": values["error"] and tuple(values["error"])})

    def run(self, job: Job) -> Outcome:
        self.start(job)
        return self.outcome()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


# --- within the server ---


def _serve() -> None:
    import reshard.plan.pipeline
    import reshard.source.open
    import reshard.writer.split
    import reshard.writer.stream

    reshard.writer.stream.STAGE_BYTES = STAGE_BYTES
    gc.collect()
    gc.freeze()  # what was imported is not copied for a fork to collect it

    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            raw = stream.read()
        _, status = os.waitpid(child, 0)
        outcome: dict[str, Any] = {"labels": [], "error": None, "written": [], "kept": [], "missing": []}
        outcome |= json.loads(raw or b"{}")
        outcome["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


def _run(job: dict[str, Any], writing: int) -> None:
    """The job, in a process of its own that ends here."""
    from reshard.errors import ReshardError
    from reshard.plan.pipeline import Cut, prepare
    from reshard.source.open import open_source
    from reshard.writer.split import SplitOptions, write_shards

    steps = Steps(Path(job["out"]), job["at"], job["action"])
    steps.install()
    outcome: dict[str, Any] = {}
    try:
        options = {"workers": 1, **job["options"]}
        if options.get("ranks") is not None:
            options["ranks"] = tuple(options["ranks"])
        with open_source(job["source"]) as source:
            result = write_shards(prepare(source, Cut(**job["cut"])), Path(job["out"]), SplitOptions(**options))
        outcome |= {
            "written": [shard.tp_rank for shard in result.written],
            "kept": [shard.tp_rank for shard in result.kept],
            "missing": list(result.missing),
        }
    except ReshardError as error:
        outcome["error"] = [type(error).__name__, error.exit_code, str(error)]
    except BaseException as error:  # any other is reported, and no test takes it for an expected one
        outcome["error"] = [f"unexpected {type(error).__name__}", -1, str(error)]
    outcome["labels"] = steps.labels
    data = json.dumps(outcome).encode()
    while data:
        data = data[os.write(writing, data) :]
    os._exit(0)


if __name__ == "__main__":
    _serve()
