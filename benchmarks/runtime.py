"""`make bench`: the split layers of DeepSeek-R1 (three, in several schemes) on two gloo processes of one thread.

In one run and in turn: pure data parallelism (each process holds the full weights and multiplies its own tokens, no
collective) with T and with 2T tokens, and the split layers with T tokens each. The bound of the gain is
2 t(T) / t(2T), t the unsplit layers' time: half the weights' bytes, the same arithmetic, collectives for nothing.
Then loading a rank's shard against reading everything and slicing, and what the processes hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import run, tool
from benchmarks.split import cpu_name
from reshard_runtime import DenseFFN, load_shard
from reshard_runtime.kernels.cpu import CpuKernels
from tests.support.distributed import Ranks

TOKENS = (1, 4, 8, 24, 64)
SCHEMES = {
    "bf16": "bf16",
    "w8a8": "w8a8_dynamic",
    "static": "w8a8_static",
    "mix": "w8a8_mix",
    "fp8 as bf16": "fp8_block",
}
LOADED = ("bf16", "w8a8")  # whose loading and memory is shown
TIMEOUT = 1200
_STEPS = ("quantize", "gather", "matmul", "activation", "scatter")
_MB = 1e6


class Timed:
    """A backend, or its collectives, whose calls are added up by step."""

    _STEP_OF = {  # noqa: RUF012
        "quantize_dynamic": "quantize",
        "quantize_static": "quantize",
        "linear": "matmul",
        "int8_matmul": "matmul",
        "int8_linear": "matmul",
        "gated": "activation",
        "gated_int8": "activation",
        "gather": "gather",
        "reduce_scatter": "scatter",
    }

    def __init__(self, inner: Any, seconds: dict[str, float]) -> None:
        self._inner, self._seconds = inner, seconds

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name == "collectives":
            return lambda group: Timed(value(group), self._seconds)
        step = self._STEP_OF.get(name)
        if step is None:
            return value
        if step == "activation":  # chosen once, for all calls
            return lambda activation: self._timed(value(activation), step)
        return self._timed(value, step)

    def _timed(self, function: Callable[..., Any], step: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **named)
            self._seconds[step] += time.perf_counter() - start
            return result

        return call


def _speed(group: dist.ProcessGroup, whole: Path, halves: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds a pass, medians, by the clock and (`processor`) of this process; the split one also by step."""
    whole_layers, half_layers = load_shard(whole, 0).layers, load_shard(halves, group.rank()).layers
    full = [DenseFFN(whole_layers.pop(index)) for index in list(whole_layers)]
    seconds: dict[str, float] = defaultdict(float)
    kernels: Any = Timed(CpuKernels(), seconds)
    split = [DenseFFN(half_layers.pop(index), group, kernels=kernels) for index in list(half_layers)]
    one, two = (torch.randn(count, full[0].hidden_size).to(full[0].dtype) for count in (tokens, 2 * tokens))
    passes: dict[str, Callable[[], None]] = {
        "t(T)": lambda: _pass(full, one),
        "t(2T)": lambda: _pass(full, two),
        "split": lambda: _pass(split, one),
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, call in passes.items():
                seconds.clear()
                dist.barrier(group)
                start, used = time.perf_counter(), time.process_time()
                call()
                took[name].append((time.perf_counter() - start, time.process_time() - used))
                if name == "split" and number:
                    steps = dict(seconds)
    clock, processor = (
        {name: statistics.median(each[which] for each in values[1:]) for name, values in took.items()}
        for which in (0, 1)
    )
    return {"steps": steps, "processor": processor, **clock}


def _pass(layers: list[DenseFFN], x_TH: torch.Tensor) -> None:
    for layer in layers:
        layer(x_TH)


def _held(group: dist.ProcessGroup, shards: Path) -> tuple[int, int]:
    """(bytes of its own, bytes of mapped files) of this process with its shard loaded and used."""
    shard = load_shard(shards, group.rank())
    with torch.inference_mode():
        layers = [
            DenseFFN(shard.layers.pop(index), group if group.size() > 1 else None) for index in list(shard.layers)
        ]
        for ffn in layers:
            ffn(torch.zeros(8, ffn.hidden_size, dtype=ffn.dtype))
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile"))
    return own, mapped


@contextmanager
def _ranks(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    try:
        yield ranks
    finally:
        ranks.stop()


def _load(kind: str, path: Path) -> None:
    """In a process of its own: rank 3 of 8's tensors, every page touched. Prints seconds and bytes read from disk."""
    from safetensors import safe_open
    from safetensors.torch import load

    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = _read_bytes()
    start = time.perf_counter()
    tensors: list[torch.Tensor] = []
    if kind == "shard":
        for layer in load_shard(path, 3).layers.values():
            tensors += [*layer.gate_up.tensors.values(), *layer.down.tensors.values()]
    elif kind == "lazily":
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                tensors += [_slice(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118 - no mapping
    else:
        for file in sorted(path.glob("*.safetensors")):
            tensors += [_slice(name, tensor) for name, tensor in load(file.read_bytes()).items()]
    for tensor in tensors:
        tensor.view(torch.uint8).reshape(-1)[::4096].sum()
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": _read_bytes() - before}))


def _slice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rank 3 of 8's part, as an engine's weight loader narrows and copies it."""
    if ".down_proj." not in name:
        return tensor.chunk(8, 0)[3].clone()
    return tensor.chunk(8, 1)[3].clone() if name.endswith(".weight") else tensor


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on a disk, 12 GB")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        _load(arguments.load[0], Path(arguments.load[1]))
        return
    print(
        f"{os.cpu_count()} processors, {cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.folder) as work:
        for name in arguments.schemes:
            _make(Path(work) / name, SCHEMES[name], (1, 2, 4, 8) if name in LOADED else (1, 2))
        _show_speeds({name: _speeds(Path(work) / name, arguments) for name in arguments.schemes})
        for name in arguments.schemes:
            if name in LOADED:
                _show_loading(Path(work) / name, name, arguments.runs)
                _show_memory(Path(work) / name, name)


def _make(folder: Path, scheme: str, sizes: tuple[int, ...]) -> None:
    config = Path(__file__).parent.parent / "configs" / "deepseek-r1.json"
    folder.mkdir()
    run([tool("reshard"), "synth", config, folder / "model", "--dense-only", "--scheme", scheme, "--quiet"])
    for size in sizes:
        run([tool("reshard"), "split", folder / "model", folder / f"tp{size}", "--tp", str(size), "--quiet"])


def _speeds(folder: Path, arguments: argparse.Namespace) -> dict[int, dict[str, Any]]:
    with _ranks(2) as ranks:
        return {
            tokens: max(
                ranks.run(_speed, folder / "tp1", folder / "tp2", tokens, arguments.runs, timeout=TIMEOUT),
                key=lambda result: result["split"],
            )
            for tokens in arguments.tokens
        }


def _show_speeds(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    for name, by_tokens in results.items():
        print(
            f"\n{name}, R = 2, milliseconds a pass of three layers: by the clock; of a processor; the split one's steps"
        )
        columns = f"{'t(T)':>9}{'split':>9}{'gain':>7}{'bound':>7}{'of it':>7}"
        print(f"{'T':>4}{columns}{columns}", *(f"{s:>10}" for s in _STEPS))
        for tokens, r in by_tokens.items():
            line = f"{tokens:4}{_gain(r)}{_gain(r['processor'])}"
            print(line, *(f"{r['steps'].get(step, 0) * 1e3:10.1f}" for step in _STEPS))
    if {"bf16", "w8a8"} <= results.keys():
        ratios = {t: results["bf16"][t]["split"] / results["w8a8"][t]["split"] for t in results["bf16"]}
        print("\nw8a8 is faster than bf16 (both split):", ", ".join(f"{r:.2f} at T = {t}" for t, r in ratios.items()))


def _gain(r: dict[str, float]) -> str:
    gain, bound = r["t(T)"] / r["split"], 2 * r["t(T)"] / r["t(2T)"]
    return f"{r['t(T)'] * 1e3:9.1f}{r['split'] * 1e3:9.1f}{gain:7.2f}{bound:7.2f}{gain / bound:7.2f}"


def _show_loading(folder: Path, name: str, runs: int) -> None:
    found: dict[str, list[dict[str, float]]] = {"shard": [], "wholly": [], "lazily": []}
    for _ in range(runs):
        for kind, values in found.items():
            path = str(folder / ("tp8" if kind == "shard" else "model"))
            command = [sys.executable, "-m", "benchmarks.runtime", "--load", kind, path]
            values.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    seconds = {kind: statistics.median(r["seconds"] for r in values) for kind, values in found.items()}
    read = {kind: max(r["bytes"] for r in values) for kind, values in found.items()}
    print(
        f"\n{name}: rank 3 of 8 loaded from disk, pages touched: {seconds['shard']:.3f} s, {read['shard'] / _MB:.0f} MB"
    )
    for kind in ("wholly", "lazily"):
        print(
            f"  source read {kind}, sliced: {seconds[kind]:.3f} s, {read[kind] / _MB:.0f} MB; ours is "
            f"{seconds['shard'] / seconds[kind]:.3f} x the time, {read['shard'] / read[kind]:.3f} x the bytes"
        )


def _show_memory(folder: Path, name: str) -> None:
    print(f"{name}: a process with its shard loaded and used holds (the largest of the ranks)")
    for size in (1, 2, 4, 8):
        with _ranks(size) as ranks:
            own, mapped = max(ranks.run(_held, folder / f"tp{size}", timeout=TIMEOUT), key=sum)
        print(f"  R = {size}: {own / _MB:.0f} MB of its own, {mapped / _MB:.0f} MB of mapped files")


if __name__ == "__main__":
    main()
