"""The profile of this machine: two processes run the runtime's kernels and exchanges, and say how fast they were.

A device is one of the two processes, with half of the processors. Rates are reached ones, so efficiencies are 1, but
for the memory's: they say how fast weights of a type are taken in by products, as a share of what is only read.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.errors import MissingDependencyError, ProfileError
from reshard.estimate.profile import GIB, LOCAL, MIB, Profile, parse_profile

PROCESSES = 2
MODULE = "reshard_runtime.measure"
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_MEASURED = "measured by reshard estimate --measure"


def measured_profile() -> Profile:
    """Measure. Raises MissingDependencyError without torch, ProfileError where a process fails."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("--measure", "torch")
    return profile_of(_run())


def profile_of(found: Sequence[Mapping[str, float]]) -> Profile:
    """The profile out of what the ranks measured: of each figure the slower rank's, for which the other waits."""
    slow = {
        key: (min if key.endswith(("bytes_s", "operations_s")) else max)(rank[key] for rank in found)
        for key in found[0]
    }
    memory = max(slow["memory_bytes_s"], slow["bf16_weight_bytes_s"], slow["int8_weight_bytes_s"])
    processors = f"{len(found)} processes at once, {_processors()} processors"
    table: dict[str, Any] = {
        "name": f"{LOCAL}: one of {processors}",
        "compute": {
            "bf16_tflops": _digits(slow["bf16_operations_s"] / 1e12),
            "int8_tops": _digits(slow["int8_operations_s"] / 1e12),
            "overlap": False,
        },
        "memory": {
            "capacity_gib": _digits(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(found) / GIB),
            "bandwidth_gib_s": _digits(memory / GIB),
            "cache_mib": _digits(_cache_bytes() / len(found) / MIB),
        },
        "network": {
            "host": {
                "topology": "switch",
                "bandwidth_gb_s": _digits(slow["link_bytes_s"] / 1e9),
                "latency_us": _digits(slow["gather_s"] * 1e6),
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
            "collective_us": 0.0,  # it is in the latency
        },
        "source": {
            "compute": f"{_MEASURED}: what each token more adds to a product, 8 to 128 tokens",
            "memory": f"{_MEASURED}: a sum over 256 MiB; capacity and cache as Linux says, divided by the processes",
            "network": f"{_MEASURED}: two processes exchange as the layers do; gathers of 1 byte and of 4 MiB",
            "efficiency": f"{_MEASURED}: what a product takes without tokens, against a sum; the rest is in the rates",
            "static": f"{_MEASURED}: calls with next to nothing to do",
        },
    }
    return parse_profile(table, LOCAL)


def to_toml(profile: Profile) -> str:
    """The profile as a file that `--device` takes."""
    return "\n".join(_lines(profile.model_dump(exclude_none=True))) + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if path and plain:
        yield from ("", f"[{'.'.join(path)}]")
    yield from (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items())
    for key, value in values.items():
        if key not in plain:
            yield from _lines(value, (*path, key))


def _run() -> list[dict[str, float]]:
    """What each process found."""
    # -P and the path: what this program imports from, not what lies in the current folder under the same name.
    command = [sys.executable, "-P", "-m", MODULE, str(PROCESSES), str(max(1, _processors() // PROCESSES))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ProfileError(f"--measure: {last.removeprefix('error: ')}")
    found: list[dict[str, float]] = json.loads(done.stdout)
    return found


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


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
