"""How fast: loading a rank's shard to the device, and a decode step's products against what the memory allows."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reshard.checkpoint.config_only import read_config
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.synth.plan import SynthOptions, plan_checkpoint
from reshard.synth.write import write_checkpoint
from reshard.writer.split import SplitOptions, write_shards
from reshard_runtime import load_shard
from reshard_runtime.kernels.cuda import CudaKernels
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import Shard
from tests.cuda.layers import Layer, Sizes, floats
from tests.cuda.report import Check, exact
from tests.support.paths import CONFIGS

Figures = dict[str, Any]
_GB = 1e9
_RANK = 3
_LAYERS = 3


class Loaded:
    """A rank's shard of R1's three dense layers, brought to the device by `load_shard`."""

    def __init__(self, scheme: str, sizes: Sizes, device: str) -> None:
        self._scheme, self._sizes, self._device = scheme, sizes, device
        self._shards: list[Shard] = []  # on the device, on the CPU

    def figures(self) -> Iterator[Figures]:
        """The time of a load out of the page cache, the best of a few and the first."""
        with tempfile.TemporaryDirectory() as folder:
            model, shards = Path(folder, "model"), Path(folder, "shards")
            options = SynthOptions(self._scheme, Fraction(self._sizes.scale), _LAYERS, dense_only=True)
            write_checkpoint(plan_checkpoint(read_config(CONFIGS / "deepseek-r1.json"), options), model)
            with open_source(str(model)) as source:
                write_shards(prepare(source, Cut(self._sizes.ranks)), shards, SplitOptions())
            took = [_timed(lambda: self._load(shards, self._device)) for _ in range(3)]
            self._load(shards, "cpu")
            found, self._shards = self._shards[0], self._shards[-2:]
        rate = found.nbytes / min(took) / _GB
        yield {"scheme": self._scheme, "bytes": found.nbytes, "first s": took[0], "best s": min(took), "GB/s": rate}

    def checks(self) -> Iterator[Check]:
        """What is on the device is what is in the file."""
        there, here = self._shards
        for index, layer in there.layers.items():
            for linear, kept in zip(layer.linears, here.layer(index).linears, strict=True):
                for name, value in linear.tensors.items():
                    yield exact(f"load_shard {self._scheme}: {linear.name}.{name}", value, kept.tensors[name])

    def _load(self, shards: Path, device: str) -> None:
        self._shards.append(load_shard(shards, _RANK, device))
        if device != "cpu":
            torch.cuda.synchronize()


def bandwidth(device: str, rounds: int, nbytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written."""
    one = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    return 2 * nbytes / _seconds(device, rounds, lambda: other.copy_(one))


def decode(layer: Layer, bytes_s: float, generator: torch.Generator) -> Iterator[Figures]:
    """Three layers' products for T tokens a rank: unsplit, and a rank's part, which multiplies every rank's tokens.

    No collective is in it. floor: the weights read once, at the bandwidth of a copy. Each of the three layers has
    weights of its own, so that no cache holds them from one step to the next.
    """
    ranks, device = layer.sizes.ranks, generator.device.type
    made = {size: [_made(layer, size) for _ in range(_LAYERS)] for size in (1, ranks)}
    for tokens in layer.sizes.decode:
        row: Figures = {"scheme": layer.scheme, "T": tokens}
        for size, layers in made.items():
            x_TH = floats(generator, size * tokens, layer.sizes.hidden)
            seconds = _seconds(device, layer.sizes.rounds, partial(_step, layers, x_TH))
            weights = sum(one.nbytes for ffn in layers for one in (ffn.gate_up_proj.weight, ffn.down_proj.weight))
            of = "unsplit" if size == 1 else f"1/{size}"
            row |= {f"{of} ms": seconds * 1e3, f"{of} floor ms": weights / bytes_s * 1e3}
        row["of the time"] = row[f"1/{ranks} ms"] / row["unsplit ms"]
        yield row


def _made(layer: Layer, ranks: int) -> PartialFFN:
    """Rank 0's part in memory of its own."""
    own = layer.shard(0, ranks).changed(
        lambda one: replace(one, tensors={name: value.clone() for name, value in one.tensors.items()})
    )
    return PartialFFN(own, CudaKernels(), torch.bfloat16, "dynamic")


def _step(layers: list[PartialFFN], x_TH: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for ffn in layers:
            x_TH = ffn.forward_local(x_TH, ffn.dtype)
    return x_TH


def _seconds(device: str, rounds: int, call: Callable[[], torch.Tensor]) -> float:
    """Median of a call's time; on a GPU of a graph's replay, by its own clock."""
    if device == "cpu":
        return statistics.median(_timed(call) for _ in range(rounds))
    from tests.cuda.graphs import captured

    with captured(call) as (replay, _):
        return statistics.median(_replayed(replay) for _ in range(rounds))


def _replayed(replay: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    stop.record()
    stop.synchronize()
    seconds: float = start.elapsed_time(stop) / 1e3
    return seconds


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
