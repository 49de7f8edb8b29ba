"""Command lines in processes of their own, without their imports: a server that has imported everything forks them.

Each is told its arguments, environment and folder, ends as a Python program does, and may be killed. The groups of
tests.support.distributed come from the same server.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.running import TIMEOUT_SECONDS, Done

# What is not installed is left out.
IMPORTED = [
    "pytest",
    "reshard.plan.pipeline",
    "reshard.writer.remote",
    "s3fs",
    "tests.support.team_process",
    "tests.support.unsplit",
    "torch.distributed",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
]
# No threads where one forks; the log level is what the command sets before it imports torch.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}


@dataclass(frozen=True)
class Job:
    """What a process does. before: Python that runs first in it; main: the module whose `main` it calls then."""

    arguments: Sequence[str]
    environment: dict[str, str]
    folder: str = str(ROOT)
    before: str = ""
    main: str = "reshard.cli.main"


class Fork:
    """A process that was started. Its output goes to files in a folder."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **job.environment}
        self._process = context().Process(target=_become, args=(job, environment, str(self._out), str(self._err)))
        self._process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it has not ended."""
        if self._process.is_alive() and self._process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def done(self) -> Done:
        """Wait for its end."""
        self._process.join(TIMEOUT_SECONDS)
        code = self._process.exitcode
        assert code is not None, f"the process has not ended within {TIMEOUT_SECONDS} s"
        return Done(code, self._out.read_text(), self._err.read_text())


def run(*jobs: Job) -> list[Done]:
    """Run them at once and wait for all."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(number)) for number in range(len(jobs))]
        for folder in folders:
            folder.mkdir()
        forks = [Fork(job, folder) for job, folder in zip(jobs, folders, strict=True)]
        try:
            return [fork.done() for fork in forks]
        finally:
            for fork in forks:
                fork.kill()


def reshard(*arguments: object, before: str = "", **environment: str) -> Done:
    """The command line in a process of its own."""
    return run(Job([str(argument) for argument in arguments], environment, before=before))[0]


@functools.cache
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    started = found.Process(target=int)  # the server takes this environment
    started.start()
    started.join(TIMEOUT_SECONDS)
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    return found


def _become(job: Job, environment: dict[str, str], out: str, err: str) -> None:
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_CREAT | os.O_WRONLY),
        (2, err, os.O_CREAT | os.O_WRONLY),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job.folder)
    sys.argv = ["reshard", *job.arguments]
    exec(job.before, {"__name__": "before"})
    importlib.import_module(job.main).main()
