"""`make bench`: the plugin in real vLLM servers (CPU build, data-parallel size 2) against the same servers without it.

Run in vLLM's own environment. First what a worker reads and how long it takes until its weights are there, from disk,
with the engine's default loader and with ours. Then, servers in turn, requests per second and time per output token.
"""

import argparse
import contextlib
import os
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from benchmarks.split import cpu_name
from reshard.plan.pipeline import Cut
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.vllm import environment, inside
from tests.vllm.inside import Served
from tests.vllm.models import VOCABULARY, write_model
from tests.vllm.server import Server, serving

INTERMEDIATE = 98_304  # with hidden_size 256 a dense layer of 151 MB in BF16
CONCURRENCY = (1, 8, 32)
TOKENS = 16
TIMEOUT = 600
_MB = 1e6


def _load(group: dist.ProcessGroup, hosts: list[Path], served: Served) -> tuple[float, int]:
    """(seconds, bytes read from disk) of loading a worker's weights.

    Each worker reads a copy of its own, as on hosts of their own: of one file the second reader would find in the page
    cache what the first has read.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    host = hosts[group.rank()]
    served = replace(served, model=host / "model", shards=served.shards and host / "tp2")
    config = inside.config_of(served)
    loader = get_model_loader(config.load_config)
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        model = loader.create_model(vllm_config=config, model_config=config.model_config)
        for file in host.glob("*/*.safetensors"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier(group)
        before, start = _read_bytes(), time.perf_counter()
        loader.load_weights(model, config.model_config)
        return time.perf_counter() - start, _read_bytes() - before


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def _show_start(hosts: list[Path], runs: int) -> None:
    model, shards = hosts[0] / "model", hosts[0] / "tp2"
    ranks = Ranks(2)
    kinds = {
        "engine": Served(model, data=2, dtype="bfloat16"),
        "ours": Served(model, shards, data=2, option=2, dtype="bfloat16"),
    }
    found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
    for number in range(runs + 1):
        for kind, served in kinds.items():
            per_rank = ranks.run(_load, hosts, served, timeout=TIMEOUT)
            if number:
                found[kind].append((max(seconds for seconds, _ in per_rank), sum(size for _, size in per_rank)))
    ranks.stop()
    seconds = {kind: statistics.median(s for s, _ in values) for kind, values in found.items()}
    read = {kind: statistics.median(size for _, size in values) for kind, values in found.items()}
    print("\nloading the weights, from disk, two workers, each with files of its own")
    for kind in kinds:
        print(f"  {kind:7} {seconds[kind]:7.2f} s {read[kind] / _MB:9.0f} MB read by both")
    times, sizes = seconds["ours"] / seconds["engine"], read["ours"] / read["engine"]
    print(f"  ours is {times:.2f} x the time, {sizes:.2f} x the bytes")


def _rates(server: Server, requests: int) -> dict[int, tuple[float, float]]:
    """By concurrency: requests a second, milliseconds an output token of a request."""
    numbers = random.Random(3)
    prompts = [[numbers.randrange(2, VOCABULARY) for _ in range(16)] for _ in range(requests)]
    for prompt in prompts[:4]:
        server.complete(prompt, 2)
    found = {}
    for concurrency in CONCURRENCY:
        took: list[float] = []

        def one(prompt: list[int], took: list[float] = took) -> None:
            start = time.perf_counter()
            server.complete(prompt, TOKENS)
            took.append(time.perf_counter() - start)

        count = max(8, min(requests, concurrency * 4))
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(one, prompts[:count]))
        seconds = time.perf_counter() - start
        found[concurrency] = count / seconds, statistics.median(took) / TOKENS * 1e3
    return found


def _show_serving(work: Path, model: Path, shards: Path, rounds: int) -> None:
    kinds: dict[str, Path | None] = {"without": None, "with": shards}
    found: dict[str, list[dict[int, tuple[float, float]]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, its in kinds.items():
            with serving(work, model, shards=its, data=2, dtype="bfloat16") as server:
                found[kind].append(_rates(server, 128))
    print(f"\nserving, 16 prompt tokens, {TOKENS} output tokens, data-parallel size 2, eager, BF16")
    print(f"{'at once':>8}{'requests/s without':>20}{'with':>8}{'ratio':>8}", end="")
    print(f"{'ms/token without':>20}{'with':>8}{'ratio':>8}")
    for concurrency in CONCURRENCY:
        rate = {kind: statistics.median(r[concurrency][0] for r in found[kind]) for kind in kinds}
        token = {kind: statistics.median(r[concurrency][1] for r in found[kind]) for kind in kinds}
        print(
            f"{concurrency:8}{rate['without']:20.2f}{rate['with']:8.2f}{rate['with'] / rate['without']:8.2f}"
            f"{token['without']:20.1f}{token['with']:8.1f}{token['with'] / token['without']:8.2f}"
        )


def main() -> None:
    """Measure and print."""
    assert environment.INSTALLED
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on a disk, 1 GB")
    parser.add_argument("--only", choices=["start", "serving"])
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, {cpu_name()}")
    work = Path(tempfile.mkdtemp(prefix=".bench-", dir=arguments.folder))
    try:
        hosts = [work / "host-0", work / "host-1"]
        model = write_model(hosts[0] / "model", dtype="bfloat16", intermediate=INTERMEDIATE)
        split(model, hosts[0] / "tp2", Cut(2))
        if arguments.only != "serving":
            shutil.copytree(hosts[0], hosts[1])
            _show_start(hosts, arguments.runs)
        if arguments.only != "start":
            _show_serving(work, model, hosts[0] / "tp2", min(2, arguments.runs))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
