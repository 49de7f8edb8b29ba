"""Faults at chosen steps of a split.

A step is one call that changes the output folder, with a label of its own that is the same in every run: what is
called, on which file (a temporary one is `name~`), the how-many-th time. `Steps` records them and kills the process
or raises an error at one. `run` is a split in a process of its own.
"""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support import forks

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
    """A split: what to cut, where to, how; and the step at which to fail. cut: what Cut takes, a part by its key."""

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


class Started:
    """A split in a process of its own."""

    def __init__(self, job: Job) -> None:
        self._place = tempfile.TemporaryDirectory()
        values = json.dumps(asdict(job), default=str)
        self._fork = forks.Fork(forks.Job([], {"JOB": values}, main="tests.support.faults"), Path(self._place.name))

    def outcome(self) -> Outcome:
        done = self._fork.done()
        self._place.cleanup()
        values: dict[str, Any] = {"labels": [], "error": None, "written": [], "kept": [], "missing": []}
        values |= json.loads(done.out or "{}")
        values["error"] = values["error"] and tuple(values["error"])
        return Outcome(signal=max(0, -done.code), **values)


def run(job: Job) -> Outcome:
    """A split, and how it ended."""
    return Started(job).outcome()


def main() -> None:
    """The job that the environment names, in this process, which ends here."""
    from reshard.errors import ReshardError
    from reshard.model.parts import DENSE_FFN, part_named
    from reshard.plan.pipeline import Cut
    from reshard.writer import stream
    from reshard.writer.split import SplitOptions
    from tests.support.running import split

    stream.STAGE_BYTES = STAGE_BYTES
    job = json.loads(os.environ["JOB"])
    steps = Steps(Path(job["out"]), job["at"], job["action"])
    steps.install()
    outcome: dict[str, Any] = {}
    try:
        options = {"workers": 1, **job["options"]}
        if options.get("ranks") is not None:
            options["ranks"] = tuple(options["ranks"])
        cut = {**job["cut"], "part": part_named(job["cut"].get("part", DENSE_FFN.key))}
        result = split(Path(job["source"]), Path(job["out"]), Cut(**cut), SplitOptions(**options))
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
    sys.stdout.write(json.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)
