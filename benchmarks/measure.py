"""Running whole commands: wall time, and the peak of memory that is the process's own."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.005
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    seconds: float
    anonymous_bytes: int
    stdout: str


def run(command: Sequence[str | Path]) -> Run:
    """Run to the end. Raises RuntimeError with its stderr if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        try:
            process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if time.perf_counter() - start > _TIMEOUT_SECONDS:
                process.kill()
                raise RuntimeError(f"{command}: still running after {_TIMEOUT_SECONDS} s") from None
    seconds = time.perf_counter() - start
    out, err = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {process.returncode}: {err.strip()}")
    return Run(seconds, peak, out)


def _anonymous_bytes(pid: int) -> int:
    """Memory that no file backs: what the process takes from others (mapped source pages can be dropped)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def tool(name: str) -> Path:
    """A console script of this environment."""
    return Path(sys.executable).parent / name
