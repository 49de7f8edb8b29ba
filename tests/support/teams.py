"""Splits by several processes: started by torchrun, or one by one with what torchrun says in the environment."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import forks
from tests.support.paths import ROOT
from tests.support.running import TIMEOUT_SECONDS, Done


def torchrun(
    *arguments: object, size: int = 2, nodes: int = 1, restarts: int = 0, fault: dict[str, Any] | None = None
) -> list[Done]:
    """`size` processes on each of so many nodes, all here. Returns what each node's torchrun says.

    fault: see tests.support.team_process.
    """
    place = (
        ["--standalone"] if nodes == 1 else ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    )
    command = [sys.executable, "-m", "torch.distributed.run", *place, "--nnodes", nodes, "--nproc-per-node", size]
    command += [
        "--max-restarts",
        restarts,
        "-m",
        "tests.support.team_process" if fault else "reshard",
        "split",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": json.dumps(fault or {}, default=str)}
    started = [
        subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(nodes)
    ]
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            ended.append(Done(process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return ended


def processes(
    *commands: Sequence[object],
    folders: Sequence[Path] = (),
    fault: dict[str, Any] | None = None,
    size: int | None = None,
    first: int = 0,
    before: str = "",
) -> list[Done]:
    """A split in one process for each command, each in a folder of its own where such are given.

    fault: see tests.support.team_process. size, first: how many there are to be and the number of the first that comes,
    where not all come. before: Python that runs first in each.
    """
    port = free_port()
    jobs = [
        forks.Job(
            ["split", *map(str, arguments)],
            {**place(number, size or len(commands), port), "FAULT": json.dumps(fault or {}, default=str)},
            str(folders[number] if folders else ROOT),
            before,
            "tests.support.team_process",
        )
        for number, arguments in enumerate(commands, first)
    ]
    return forks.run(*jobs)


def place(number: int, size: int, port: int) -> dict[str, str]:
    """What torchrun says to a process, all of them on this host."""
    return {
        "RANK": str(number),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
