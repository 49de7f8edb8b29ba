"""The split layers of any shard set, run and compared with the unsplit ones.

    python -m reshard_runtime.demo SHARDS
    torchrun --nproc-per-node 4 -m reshard_runtime.demo SHARDS      (as many as the set has ranks)

Each rank loads its own shard, brings its own tokens and says what it holds; rank 0 then reads every shard, puts the
unsplit layers together and says how far the split results are from them.
"""

import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from reshard.errors import GroupError, ReshardError, ShardError
from reshard.model.activation import not_computed
from reshard_runtime.ffn import DenseFFN
from reshard_runtime.loader import load_shard, read_manifest
from reshard_runtime.reference import exact, unsplit

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_TIMEOUT = timedelta(seconds=300)
_ROUNDS = 20
_MIB = 1 << 20


def main(
    shards: Annotated[Path, typer.Argument(help="A shard set.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
) -> None:
    """Run the split layers of a shard set and compare them with the unsplit ones."""
    try:
        manifest, _ = read_manifest(shards)
        tp_size = manifest.tp_size
        for layer in manifest.layers:
            problem = not_computed(layer.activation)
            if problem is not None:
                raise ShardError(f"{shards}: layer {layer.index}: {problem}")
        if device not in _BACKENDS:
            raise GroupError(f"--device is {device}; it may be {', '.join(_BACKENDS)}")
        if "RANK" in os.environ:
            started = int(os.environ["WORLD_SIZE"])
            if started != tp_size:
                raise GroupError(f"{shards} is cut for {tp_size} ranks, torchrun started {started} processes")
            _rank(int(os.environ["RANK"]), tp_size, "env://", shards, tokens, device)
        else:
            with tempfile.TemporaryDirectory() as folder:
                place = (tp_size, f"file://{folder}/ranks", shards, tokens, device)
                torch.multiprocessing.spawn(_rank, place, nprocs=tp_size)
    except ReshardError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(error.exit_code) from None


def _rank(rank: int, tp_size: int, meeting: str, shards: Path, tokens: int, device: str) -> None:
    """One process of the group."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp_size))
    place = torch.device(device if device == "cpu" else f"{device}:{os.environ.get('LOCAL_RANK', rank)}")
    dist.init_process_group(_BACKENDS[device], init_method=meeting, rank=rank, world_size=tp_size, timeout=_TIMEOUT)
    group = dist.group.WORLD
    start = time.perf_counter()
    shard = load_shard(shards, rank, place, tp_size=tp_size)
    layers = {index: DenseFFN(layer, group) for index, layer in shard.layers.items()}
    loaded = time.perf_counter() - start
    outputs, seconds = {}, {}
    with torch.inference_mode():
        for index, ffn in layers.items():
            x_TH = _tokens(rank, index, tokens, ffn)
            outputs[index] = ffn(x_TH).cpu()
            seconds[index] = _time(ffn, x_TH, place)
    fact = (
        f"rank {rank}: {shard.file}, {shard.nbytes / _MIB:.2f} MiB in {len(layers)} layers, loaded in "
        f"{loaded * 1e3:.0f} ms; the process holds {_memory()}"
    )
    said: list[Any] = [None] * tp_size
    dist.all_gather_object(said, (fact, outputs, seconds), group=group)
    if rank == 0:
        _report(shards, said, layers, tokens)
    dist.barrier()
    dist.destroy_process_group()


def _tokens(rank: int, index: int, count: int, ffn: DenseFFN) -> torch.Tensor:
    """A rank's random tokens for a layer: [T, H], every rank can make every other's."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    return torch.randn(count, ffn.hidden_size, generator=generator).to(ffn.dtype).to(ffn.device)


def _time(ffn: DenseFFN, x_TH: torch.Tensor, place: torch.device) -> float:
    """Median seconds of a call, the device's work included."""
    wait = (lambda: None) if place.type == "cpu" else getattr(torch, place.type).synchronize
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        ffn(x_TH)
        wait()
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds)


def _memory() -> str:
    """Of this process, as the system counts it: its own, and file pages that it maps."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return f"{own:.0f} MiB of its own and maps {mapped:.0f} MiB of files"


def _report(shards: Path, said: list[Any], layers: dict[int, DenseFFN], tokens: int) -> None:
    for fact, _, _ in said:
        print(fact)  # noqa: T201
    tp_size = len(said)
    parts = [load_shard(shards, rank) for rank in range(tp_size)]
    for index, ffn in layers.items():
        x_TH = torch.cat([_tokens(rank, index, tokens, ffn).cpu() for rank in range(tp_size)])
        split_TH = torch.cat([outputs[index] for _, outputs, _ in said])
        layer = unsplit([part.layer(index) for part in parts])
        reference = exact(layer, x_TH)
        with torch.inference_mode():
            whole = DenseFFN(layer, dtype=ffn.dtype)
            whole_TH, took = whole(x_TH), _time(whole, x_TH[:tokens], torch.device("cpu"))
        slowest = max(seconds[index] for _, _, seconds in said)
        print(  # noqa: T201
            f"layer {index}: {tp_size} ranks, {tokens} tokens each: error {_error(split_TH, reference):.2e} split, "
            f"{_error(whole_TH, reference):.2e} unsplit, {_error(split_TH, whole_TH.double()):.2e} between them; "
            f"{slowest * 1e3:.2f} ms a call, unsplit on the CPU {took * 1e3:.2f}"
        )
    print("error: root mean square, relative to the unsplit layer in float64")  # noqa: T201


def _error(y_TH: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y_TH.double() - reference).norm() / reference.norm())


if __name__ == "__main__":
    typer.run(main)
