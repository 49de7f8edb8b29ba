"""Command lines in processes of their own, without their imports: a server that has imported everything forks them.

Each is told its arguments, environment and folder, ends as any Python program does, and may be killed.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.running import TIMEOUT_SECONDS, Done


class Fork:
    """A process that was started. Its output goes to files in a folder."""

    def __init__(self, job: "Job", folder: Path) -> None:
        self._server = _server()
        self._out, self._err = folder / "out", folder / "err"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **job.environment}
        self.pid = self._server.start(
            {**vars(job), "environment": environment, "stdout": str(self._out), "stderr": str(self._err)}
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it has not ended."""
        if self.pid not in self._server.ended:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the server has yet to be heard
                os.kill(self.pid, number)

    def done(self) -> Done:
        """Wait for its end."""
        code = self._server.wait(self.pid)
        return Done(code, self._out.read_text(), self._err.read_text())


@dataclass(frozen=True)
class Job:
    """What a process does. before: Python that runs first in it; main: the module whose `main` it calls then."""

    arguments: Sequence[str]
    environment: dict[str, str]
    folder: str = str(ROOT)
    before: str = ""
    main: str = "reshard.cli.main"


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


class Server:
    """The process that forks. It ends with its standard input."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        self._heard = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks"],
            cwd=ROOT,
            # No threads where one forks; the log level is what the command sets before it imports torch.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        while "started" not in (event := self._event()):
            pass
        return int(event["started"])

    def wait(self, pid: int) -> int:
        """The exit code, negative for a signal, as subprocess has it."""
        while pid not in self.ended:
            self._event()
        return self.ended[pid]

    def close(self) -> None:
        self._process.communicate(timeout=TIMEOUT_SECONDS)

    def _event(self) -> dict[str, int]:
        assert self._process.stdout is not None
        while b"\n" not in self._heard:  # not by the file's own buffer, in which `select` does not see a second line
            ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT_SECONDS)
            assert ready, f"no process has ended within {TIMEOUT_SECONDS} s"
            data = os.read(self._process.stdout.fileno(), 4096)
            assert data, "the server of processes has died"
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        event: dict[str, int] = json.loads(line)
        if "ended" in event:
            self.ended[event["ended"]] = event["code"]
        return event


@functools.cache
def _server() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


# --- within the server ---


def _serve() -> None:
    for module in (
        "s3fs",
        "reshard.plan.pipeline",
        "reshard.writer.remote",
        "torch.distributed",
        "tests.support.team_process",
    ):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what was imported is not copied for a fork to collect it
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writing)
    while True:
        ready, _, _ = select.select([0, reading], [], [])
        if reading in ready:
            os.read(reading, 4096)
            _report_ended()
        if 0 in ready:
            line = _read_line()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(reading)
                os.close(writing)
                _become(json.loads(line))
                return  # from here on it ends as any program does
            print(json.dumps({"started": pid}), flush=True)  # noqa: T201


def _read_line() -> bytes:
    """Byte by byte: what a buffer holds `select` does not see."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _report_ended() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)  # noqa: T201


def _become(job: dict[str, Any]) -> None:
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["stdout"], os.O_CREAT | os.O_WRONLY),
        (2, job["stderr"], os.O_CREAT | os.O_WRONLY),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = ["reshard", *job["arguments"]]
    exec(job["before"], {"__name__": "before"})
    importlib.import_module(job["main"]).main()


if __name__ == "__main__":
    _serve()
