"""Splits by several processes: started by torchrun, or one by one with what torchrun says in the environment."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import ROOT
from tests.running import Done

TIMEOUT = 120.0


def torchrun(*arguments: object, size: int = 2, nodes: int = 1, module: str = "reshard") -> list[Done]:
    """`size` processes on each of so many nodes, all here. Returns what each node's torchrun says."""
    place = (
        ["--standalone"] if nodes == 1 else ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    )
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nnodes", nodes, "--nproc-per-node", size]
    command += ["-m", module, "split", *arguments]
    return _finish([_start(command, ROOT, {}) for _ in range(nodes)])


def processes(
    *commands: Sequence[object],
    folders: Sequence[Path] = (),
    fault: dict[str, Any] | None = None,
    size: int | None = None,
    before: str = "",
) -> list[Done]:
    """A split in one process for each command, each in a folder of its own where such are given.

    fault: see tests.team_process. size: how many there are to be, where not all come. A process that does nothing
    more is killed when the others have ended.
    """
    port = free_port()
    started = []
    for number, arguments in enumerate(commands):
        environment = {
            "RANK": str(number),
            "WORLD_SIZE": str(size or len(commands)),
            "LOCAL_WORLD_SIZE": str(len(commands)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "FAULT": json.dumps(fault or {}, default=str),
            "PYTHONPATH": str(ROOT),
        }
        program = (
            ["-c", f"{before}\nfrom reshard.cli.main import main\nmain()"] if before else ["-m", "tests.team_process"]
        )
        command = [sys.executable, *program, "split", *arguments]
        started.append(_start(command, folders[number] if folders else ROOT, environment))
    return _finish(started, fault.get("process") if fault and fault.get("action") == "stop" else None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: Sequence[object], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(started: list[subprocess.Popen[str]], stopped: int | None = None) -> list[Done]:
    ended: dict[int, Done] = {}
    try:
        for number, process in sorted(enumerate(started), key=lambda item: item[0] == stopped):
            if number == stopped:
                process.kill()
            out, err = process.communicate(timeout=TIMEOUT)
            ended[number] = Done(process.returncode, out, err)
    finally:
        for process in started:
            process.kill()
    return [ended[number] for number in range(len(started))]
