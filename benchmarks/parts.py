"""`make bench`: `reshard split` of all four parts of DeepSeek-R1 in BF16 (tp 8, 20 GB written) against writing as much.

In one run, in turn, medians of `--runs` rounds after a warm-up round, on disk. The source is sparse: as many bytes are
read as of a real one, of which the disk has to bring none: the kernel clears memory for them instead. copy_direct
reads as many bytes of a sparse file, and writes them: what of the time is the reading's.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Run, run, tool
from benchmarks.split import ANONYMOUS_LIMIT, TARGETS, TP, cpu_name
from reshard.model.parts import PARTS

PEERS = ("write_direct", "copy_direct")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=Path.cwd(), help="a folder on a disk, 21 GB")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, {cpu_name()}, Linux {os.uname().release}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.disk) as folder:
        _measure(Path(folder), arguments.runs)


def _measure(work: Path, runs: int) -> None:
    source, size, out = work / "source", work / "size", work / "out"
    config = Path(__file__).parent.parent / "configs" / "deepseek-r1.json"
    run([tool("reshard"), "synth", config, source, "--scheme", "bf16", "--sparse", "--quiet"])
    parts = [word for part in PARTS for word in ("--part", part)]
    commands: dict[str, list[str | Path]] = {
        "ours": [tool("reshard"), "split", source, out, "--tp", str(TP), *parts, "--quiet"],
        **{peer: [sys.executable, "-m", "benchmarks.peers", peer, size, out, str(TP)] for peer in PEERS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    anonymous, nbytes = 0, 0
    for number in range(runs + 1):
        for name, command in commands.items():
            done, synced = _synced(command, out)
            if name == "ours":
                anonymous, nbytes = max(anonymous, done.anonymous_bytes), _bytes(out)
                _make_sparse(size, nbytes)
            if number:
                seconds[name].append((float(done.stdout) if name in PEERS else done.seconds) + synced)
            shutil.rmtree(out)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{', '.join(PARTS)}: {nbytes / 1e9:.2f} GB written")
    for name, values in seconds.items():
        ratio = f"ours is {medians['ours'] / medians[name]:.2f} x" if name in PEERS else ""
        print(f"  {name:14}{medians[name]:9.2f} s{min(values):9.2f}{max(values):9.2f}  {ratio}")
    print(f"  target of write_direct: {TARGETS['limit'][0]}")
    print(f"  anonymous memory of ours: {anonymous / 1e6:.0f} MB (target {ANONYMOUS_LIMIT / 1e6:.0f})")


def _synced(command: list[str | Path], out: Path) -> tuple[Run, float]:
    """The command, and the seconds in which what it left to the kernel is on the disk."""
    done = run(command)
    start = time.perf_counter()
    subprocess.run(["sync", "-f", out], check=True)
    return done, time.perf_counter() - start


def _make_sparse(folder: Path, nbytes: int) -> None:
    """One file of so many bytes, none of them in the page cache."""
    folder.mkdir(exist_ok=True)
    with (folder / "as-many.safetensors").open("wb") as file:
        file.truncate(nbytes)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


if __name__ == "__main__":
    main()
