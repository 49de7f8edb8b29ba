"""`make bench`: `reshard split` of DeepSeek-R1's three dense layers (BF16, 2.38 GB, tp 8) against its peers.

All in one run, in turn, medians of `--runs` rounds after a warm-up round, the source in the page cache; on disk and in
a memory file system. On disk each is followed by `sync -f` within the measured time. Ours and `cp` are whole
commands; the peers' imports are left out of their time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import run, tool

TP = 8
BARE_TYPER = """import typer
app = typer.Typer(add_completion=False)
@app.command()
def one(name: str) -> None: ...
@app.command()
def two(name: str) -> None: ...
app()
"""
# Ratios of medians: ours over the peer. The first of each pair is on disk, the second in memory.
TARGETS = {"cp -r": (0.4, 1.1), "get_slice": (0.33, 0.33), "narrow": (0.25, 0.33), "limit": (1.3, None)}
PEERS = ("get_slice", "narrow", "write_buffered", "write_direct")
ANONYMOUS_LIMIT = 200_000_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder in a memory file system")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, {cpu_name()}, Linux {os.uname().release}, Python {sys.version.split()[0]}")
    results = {}
    for place, folder, on_disk in (("disk", arguments.disk, True), ("memory", arguments.memory, False)):
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as work:
            results[place] = _split(Path(work), arguments.runs, on_disk=on_disk)
            _show(place, results[place])
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.disk) as work:
        results["start"] = _start(Path(work), arguments.runs)
    print(json.dumps(results))


def _split(work: Path, runs: int, *, on_disk: bool) -> dict[str, list[float]]:
    """Seconds of each contender, round by round; `anonymous` is ours in bytes."""
    source, out = work / "source", work / "out"
    config = Path(__file__).parent.parent / "configs" / "deepseek-r1.json"
    run([tool("reshard"), "synth", config, source, "--dense-only", "--scheme", "bf16", "--quiet"])
    commands: dict[str, list[str | Path]] = {
        "ours": [tool("reshard"), "split", source, out, "--tp", str(TP), "--quiet"],
        "cp -r": ["cp", "-r", source, out],
        **{peer: [sys.executable, "-m", "benchmarks.peers", peer, source, out, str(TP)] for peer in PEERS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*commands, "anonymous")}
    for number in range(runs + 1):
        for name, command in commands.items():
            done = run(command)
            start = time.perf_counter()
            if on_disk:
                subprocess.run(["sync", "-f", out], check=True)
            took = (float(done.stdout) if name in PEERS else done.seconds) + time.perf_counter() - start
            if number:
                seconds[name].append(took)
                if name == "ours":
                    seconds["anonymous"].append(done.anonymous_bytes)
            shutil.rmtree(out)
            if on_disk:
                subprocess.run(["sync", "-f", work], check=True)
    return seconds


def _show(place: str, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["limit"] = min(medians["write_buffered"], medians["write_direct"])
    print(f"\n{place}: {'':14}{'median s':>9}{'min':>7}{'max':>7}{'ours is':>9}{'target':>8}")
    for name in ("ours", "cp -r", "get_slice", "narrow", "write_buffered", "write_direct", "limit"):
        values = seconds.get(name, [medians[name]])
        target = TARGETS.get(name, (None, None))[place == "memory"]
        ratio = "" if name == "ours" else f"{medians['ours'] / medians[name]:.2f} x"
        verdict = "" if target is None else f"{target:.2f}"
        line = f"  {name:20}{medians[name]:9.2f}{min(values):7.2f}{max(values):7.2f}{ratio:>9}{verdict:>8}"
        print(line)
    print(f"  anonymous memory of ours: {max(seconds['anonymous']) / 1e6:.0f} MB (target {ANONYMOUS_LIMIT / 1e6:.0f})")


def _start(work: Path, runs: int) -> dict[str, list[float]]:
    """`--help` against a bare Typer program, and `inspect` of R1 as it is: 163 files, made sparse."""
    bare, sparse = work / "bare.py", work / "sparse"
    bare.write_text(BARE_TYPER)
    config = Path(__file__).parent.parent / "configs" / "deepseek-r1.json"
    made = run([tool("reshard"), "synth", config, sparse, "--scheme", "fp8_block", "--sparse", "--quiet"])
    commands: dict[str, list[str | Path]] = {
        "reshard --help": [tool("reshard"), "--help"],
        "bare typer --help": [sys.executable, bare, "--help"],
        "inspect R1": [tool("reshard"), "inspect", sparse],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak = 0
    for number in range(runs + 1):
        for name, command in commands.items():
            done = run(command)
            peak = max(peak, done.anonymous_bytes)
            if number:
                seconds[name].append(done.seconds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    files = list(sparse.glob("*.safetensors"))
    print("\nstart:")
    ours, bare_time = medians["reshard --help"], medians["bare typer --help"]
    print(f"  --help {ours:.3f} s, a bare Typer program {bare_time:.3f} s: {ours / bare_time:.2f} x (target 1.50)")
    apparent, used = sum(f.stat().st_size for f in files), sum(f.stat().st_blocks * 512 for f in files)
    print(f"  sparse R1: {len(files)} files, {apparent / 1e9:.0f} GB on {used / 1e6:.0f} MB of disk")
    print(f"  synth made it in {made.seconds:.1f} s")
    print(f"  inspect: {medians['inspect R1']:.2f} s (target 2), {peak / 1e6:.0f} MB anonymous (target 300)")
    return seconds


def cpu_name() -> str:
    """The processor, by its own name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


if __name__ == "__main__":
    main()
