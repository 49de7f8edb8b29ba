"""The split layers of any shard set, run and compared with the unsplit ones.

    python -m reshard_runtime.demo SHARDS
    torchrun --nproc-per-node 4 -m reshard_runtime.demo SHARDS      (as many as the set has ranks)

Each rank loads its own shard, brings its own tokens and says what it holds. Rank 0 then says how far the split results
are from the layer in float64, by what verify computes with, and from that of a group of 1, for which it cuts the set
again in a temporary folder.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from reshard.cli.options import Debug
from reshard.cli.output import Output
from reshard.errors import GroupError, ShardError
from reshard.model.activation import not_computed
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import describe, open_source
from reshard.verification.layer import unsplit_layer
from reshard.verification.reference import stored_linear
from reshard.writer.split import SplitOptions, write_shards
from reshard.writer.team import read_place
from reshard_runtime.ffn import DenseFFN
from reshard_runtime.group import agreement
from reshard_runtime.loader import load_shard, read_manifest
from reshard_runtime.processes import program, rank_output, spawn

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_TIMEOUT = timedelta(seconds=300)
_ROUNDS = 20
_MIB = 1 << 20


def main(
    shards: Annotated[Path, typer.Argument(help="A shard set.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Run the split layers of a shard set and compare them with the unsplit ones."""
    with Output("human", quiet=True, debug=debug).errors(), tempfile.TemporaryDirectory() as folder:
        tp_size = _tp_size(shards)
        if device not in _BACKENDS:
            raise GroupError(f"--device is {device}; it may be {', '.join(_BACKENDS)}")
        given = (Path(folder), shards, tokens, device, debug)
        if "RANK" in os.environ:
            place = read_place()
            if place.size != tp_size:
                raise GroupError(f"{shards} is cut for {tp_size} ranks, torchrun started {place.size} processes")
            _process(place.number, tp_size, "env://", *given)
        else:
            spawn(_process, tp_size, tp_size, f"file://{folder}/ranks", *given)


def _tp_size(shards: Path) -> int:
    """The set's. Raises ShardError where a layer cannot be computed."""
    manifest, _ = read_manifest(shards)
    for layer in manifest.layers:
        problem = not_computed(layer.activation)
        if problem is not None:
            raise ShardError(f"{shards}: layer {layer.index}: {problem}")
    return manifest.tp_size


def _process(
    rank: int, tp_size: int, meeting: str, folder: Path, shards: Path, tokens: int, device: str, debug: bool
) -> None:
    """One of the group. folder: a temporary one, for all of them or its own."""
    with rank_output(rank, tp_size, debug) as output:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp_size))
        place = torch.device(device if device == "cpu" else f"{device}:{os.environ.get('LOCAL_RANK', rank)}")
        dist.init_process_group(_BACKENDS[device], init_method=meeting, rank=rank, world_size=tp_size, timeout=_TIMEOUT)
        for line in compared(dist.group.WORLD, folder, shards, tokens, place):
            output.text(line)
        dist.barrier()
        dist.destroy_process_group()


def compared(group: dist.ProcessGroup, folder: Path, shards: Path, tokens: int, place: torch.device) -> list[str]:
    """Run every layer with `tokens` tokens of each rank; what is to be said of it, on rank 0. folder: as above."""
    rank, start = group.rank(), time.perf_counter()
    with agreement(group):
        shard = load_shard(shards, rank, place, tp_size=group.size())
    size = shard.nbytes
    layers = {index: DenseFFN(shard.layers.pop(index), group) for index in list(shard.layers)}
    loaded = time.perf_counter() - start
    outputs, seconds = {}, {}
    with torch.inference_mode():
        for index, ffn in layers.items():
            x_TH = _tokens(rank, index, tokens, ffn)
            outputs[index] = ffn(x_TH).cpu()
            seconds[index] = _time(ffn, x_TH)
    fact = (
        f"rank {rank}: {shard.file}, {size / _MIB:.2f} MiB in {len(layers)} layers, loaded in "
        f"{loaded * 1e3:.0f} ms; the process holds {_memory()}"
    )
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, (fact, outputs, seconds), group=group)
    if rank:
        return []
    lines = [*(fact for fact, _, _ in said), *_compared(shards, folder, said, layers, tokens)]
    return [*lines, "error: root mean square, relative to the unsplit layer in float64"]


def _tokens(rank: int, index: int, count: int, ffn: DenseFFN) -> torch.Tensor:
    """A rank's random tokens for a layer: [T, H], every rank can make every other's."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    return torch.randn(count, ffn.hidden_size, generator=generator).to(ffn.dtype).to(ffn.device)


def _time(ffn: DenseFFN, x_TH: torch.Tensor) -> float:
    """Median seconds of a call, the device's work included."""
    wait = (lambda: None) if x_TH.is_cpu else getattr(torch, x_TH.device.type).synchronize
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


def _compared(shards: Path, folder: Path, said: list[Any], layers: dict[int, DenseFFN], tokens: int) -> Iterator[str]:
    """A line for each layer. said: each rank's (…, outputs, seconds) by layer."""
    with open_source(str(shards)) as source:
        write_shards(prepare(source, Cut(1, pad=True)), folder / "tp1", SplitOptions())
        whole = load_shard(folder / "tp1", 0)
        for layer in describe(source).layers:
            index, ffn = layer.number, layers[layer.number]
            x_TH = torch.cat([_tokens(rank, index, tokens, ffn).cpu() for rank in range(len(said))])
            split_TH = torch.cat([outputs[index] for _, outputs, _ in said])
            linears = {role: stored_linear(source, linear) for role, linear in layer.linears.items()}
            exact_HT = unsplit_layer(linears, ffn.activation, x_TH.double().t().numpy(), exact=True)
            exact_TH = torch.from_numpy(exact_HT).t()
            with torch.inference_mode():
                unsplit = DenseFFN(whole.layer(index), dtype=ffn.dtype)
                unsplit_TH, took = unsplit(x_TH), _time(unsplit, x_TH[:tokens])
            slowest = max(seconds[index] for _, _, seconds in said)
            yield (
                f"layer {index}: {len(said)} ranks, {tokens} tokens each: error {_error(split_TH, exact_TH):.2e} "
                f"split, {_error(unsplit_TH, exact_TH):.2e} unsplit, {_error(split_TH, unsplit_TH.double()):.2e} "
                f"between them; {slowest * 1e3:.2f} ms a call, unsplit on the CPU {took * 1e3:.2f}"
            )


def _error(y_TH: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y_TH.double() - reference).norm() / reference.norm())


if __name__ == "__main__":
    program(main)
