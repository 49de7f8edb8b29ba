"""The profile of this machine: two processes run the runtime's kernels and gloo, and say how fast they were.

A device is one of the two processes, with half of the processors. Rates are reached ones, so efficiencies are 1, but
for the memory's: they say how fast weights of a type are taken in by products, as a share of what is only read.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from reshard.errors import MissingDependencyError, ProfileError
from reshard.estimate.model import GIB
from reshard.estimate.profile import LOCAL, Profile, parse_profile

PROCESSES = 2
TIMEOUT_SECONDS = 300
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_MEASURED = "measured by reshard estimate --measure"


def measured_profile() -> Profile:
    """Measure. Raises MissingDependencyError without torch, ProfileError where a process fails or hangs."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(
            "--measure runs the runtime's kernels, which need torch: pip install 'reshard[runtime]'"
        )
    return profile_of(_run())


def profile_of(found: Sequence[Mapping[str, float]]) -> Profile:
    """The profile out of what the ranks measured: of each figure the slower rank's, for which the other waits."""
    slow = {
        key: (min if key.endswith(("bytes_s", "operations_s")) else max)(rank[key] for rank in found)
        for key in found[0]
    }
    memory = max(slow["memory_bytes_s"], slow["bf16_weight_bytes_s"], slow["int8_weight_bytes_s"])
    static_collective = max(0.0, slow["gather_s"] - slow["latency_s"])
    processors = f"{len(found)} processes at once, {_processors()} processors"
    table: dict[str, Any] = {
        "name": f"{LOCAL}: one of {processors}",
        "compute": {
            "bf16_tflops": _digits(slow["bf16_operations_s"] / 1e12),
            "int8_tops": _digits(slow["int8_operations_s"] / 1e12),
            "overlap": False,
        },
        "memory": {
            "capacity_gib": _digits(_memory_bytes() / len(found) / GIB),
            "bandwidth_gib_s": _digits(memory / GIB),
            "cache_mib": _digits(_cache_bytes() / len(found) / (1 << 20)),
        },
        "network": {
            "host": {
                "topology": "switch",
                "bandwidth_gb_s": _digits(slow["link_bytes_s"] / 1e9),
                "latency_us": _digits(slow["latency_s"] * 1e6),
            }
        },
        "efficiency": {
            "compute": 1.0,
            "memory_bf16": _digits(slow["bf16_weight_bytes_s"] / memory),
            "memory_int8": _digits(slow["int8_weight_bytes_s"] / memory),
            "communication": 1.0,
        },
        "static": {
            "matmul_us": _digits(slow["matmul_s"] * 1e6),
            "vector_us": _digits(slow["vector_s"] * 1e6),
            "collective_us": _digits(static_collective * 1e6),
        },
        "source": {
            "compute": f"{_MEASURED}: what each token more adds to a product, 8 to 128 tokens",
            "memory": f"{_MEASURED}: a sum over 256 MiB; capacity and cache as Linux says, divided by the processes",
            "network": f"{_MEASURED}: gloo between two processes; 1 byte there and back, a gather of 4 MiB",
            "efficiency": f"{_MEASURED}: what a product takes without tokens, against a sum; the rest is in the rates",
            "static": f"{_MEASURED}: calls with next to nothing to do",
        },
    }
    return parse_profile(table, LOCAL)


def to_toml(profile: Profile) -> str:
    """The profile as a file that `--device` takes."""
    lines: list[str] = []
    _table(profile.model_dump(exclude_none=True), (), lines)
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if path and plain:
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, dict):
            _table(value, (*path, key), lines)


def _run() -> list[dict[str, float]]:
    # -P and the path: what this program imports from, not what lies in the current folder under the same name.
    command = [sys.executable, "-P", "-m", "reshard_runtime.measure"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    threads = str(max(1, _processors() // PROCESSES))
    with tempfile.TemporaryDirectory(prefix="reshard-measure-") as folder:
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(PROCESSES), threads, str(Path(folder) / "meeting")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(PROCESSES)
        ]
        return _results(processes)


def _results(processes: "Sequence[subprocess.Popen[str]]") -> list[dict[str, float]]:
    """What each printed. The first that fails is the error: the others then fail for want of it, and are killed."""
    with ThreadPoolExecutor(len(processes)) as threads:
        try:
            waiting = [threads.submit(_result, rank, process) for rank, process in enumerate(processes)]
            for done in as_completed(waiting):
                done.result()
            return [done.result() for done in waiting]
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _result(rank: int, process: "subprocess.Popen[str]") -> dict[str, float]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ProfileError(f"--measure: process {rank} gave no figures within {TIMEOUT_SECONDS} s") from None
    if process.returncode != 0:
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise ProfileError(f"--measure: process {rank} ended with {process.returncode}: {last}")
    found: dict[str, float] = json.loads(out)
    return found


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cache_bytes() -> int:
    """The largest of the first processor's caches; 0 where Linux does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in _CACHE.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes, default=0)


def _digits(value: float) -> float:
    """Three of them: no more is known."""
    return float(f"{value:.3g}")
