"""Unsplit layers, what split results are compared with: Hugging Face transformers' own, a set's, verify's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from reshard.model.activation import SILU, Activation
from reshard.plan.pipeline import Cut
from reshard.source.open import describe, open_source
from reshard.verification.layer import unsplit_layer
from reshard.verification.reference import stored_linear
from reshard_runtime import DenseFFN, LayerShard, load_shard
from reshard_runtime.collectives import Collectives, PairwiseCollectives
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.shard import LinearShard
from tests.support.running import split

Weights = Mapping[str, torch.Tensor]


class TensorCpuKernels(CpuKernels):
    """The CPU backend, partial sums added by the collective."""

    def collectives(self, group: dist.ProcessGroup) -> Collectives:
        return Collectives(group)


class Counting(PairwiseCollectives):
    """The CPU's collectives, which note what they are given: (name, shape, bytes)."""

    def __init__(self, group: dist.ProcessGroup, calls: list[tuple[str, tuple[int, ...], int]]) -> None:
        super().__init__(group)
        self._inner, self._calls = PairwiseCollectives(group), calls

    def gather(
        self, rows_PW: torch.Tensor, out: torch.Tensor | None = None, counts: Sequence[int] = ()
    ) -> torch.Tensor:
        self._note("gather", rows_PW)
        return self._inner.gather(rows_PW, out, counts)

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self._note("reduce_scatter", partial_RPH)
        return self._inner.reduce_scatter(partial_RPH, out)

    def all_reduce(self, partial_PH: torch.Tensor, counts: Sequence[int] = ()) -> torch.Tensor:
        self._note("all_reduce", partial_PH)
        return self._inner.all_reduce(partial_PH, counts)

    def _note(self, name: str, rows: torch.Tensor) -> None:
        self._calls.append((name, tuple(rows.shape), rows.nbytes))


class CountingKernels(CpuKernels):
    """The CPU backend with such collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], int]] = []

    def collectives(self, group: dist.ProcessGroup) -> Counting:
        return Counting(group, self.calls)


def unsplit_mlp(hidden: int, intermediate: int, dtype: torch.dtype, seed: int = 0) -> Any:
    """Transformers' DeepseekV3MLP with weights of 1 / sqrt(in_features)."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    torch.manual_seed(seed)
    mlp = DeepseekV3MLP(DeepseekV3Config(hidden_size=hidden, intermediate_size=intermediate))
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        torch.nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
    return mlp.to(dtype).requires_grad_(False)


def plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor of a layer as the file has it, in memory of its own; oneDNN's packed ones can only be multiplied."""
    return value.to_dense() if value.is_mkldnn else value.detach().clone()


def part(weights: Weights, tp_rank: int, tp_size: int) -> LayerShard:
    """One rank's part of an MLP's state dict, cut here by hand."""
    gate, up, down = (weights[f"{role}_proj.weight"] for role in ("gate", "up", "down"))
    rows = slice(tp_rank * len(gate) // tp_size, (tp_rank + 1) * len(gate) // tp_size)
    share = len(gate) // tp_size
    return LayerShard(
        0, tp_rank, tp_size, gate.shape[1], len(gate), share, "",
        LinearShard("gate_up_proj", "bf16", None, {"weight": torch.cat([gate[rows], up[rows]])}),
        LinearShard("down_proj", "bf16", None, {"weight": down[:, rows].contiguous()}),
        Activation(SILU),
    )  # fmt: skip


def whole_layer(source: Path, index: int = 0) -> LayerShard:
    """A layer of a checkpoint or set as the one rank of a group of 1 holds it."""
    with TemporaryDirectory() as folder:  # what is loaded stays mapped
        split(source, Path(folder, "tp1"), Cut(1))
        return load_shard(Path(folder, "tp1"), 0).layer(index)


def exact(source: Path, x_TH: torch.Tensor, index: int = 0) -> torch.Tensor:
    """A layer of a checkpoint or set in float64, no token quantized: [T, H], by what verify computes with."""
    with open_source(str(source)) as opened:
        layer = next(layer for layer in describe(opened).layers if layer.index == index)
        linears = {role: stored_linear(opened, linear) for role, linear in layer.linears.items()}
        assert layer.activation is not None
        return torch.from_numpy(unsplit_layer(linears, layer.activation, x_TH.double().t().numpy(), exact=True)).t()


def split_outputs(
    group: dist.ProcessGroup, weights: Weights, x_TH: torch.Tensor, ways: dict[str, tuple[bool, torch.dtype]]
) -> dict[str, torch.Tensor]:
    """The rank's outputs for its share of the tokens, by way: (pairwise or by the collective, type of the sums)."""
    layer = part(weights, group.rank(), group.size())
    own = x_TH.chunk(group.size())[group.rank()]
    return {
        name: DenseFFN(layer, group, reduce_dtype=dtype, kernels=CpuKernels() if pairwise else TensorCpuKernels())(own)
        for name, (pairwise, dtype) in ways.items()
    }


def relative(outputs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Errors in float64, each relative to the root mean square of its token's outputs; of tokens that are not zero."""
    size = reference.pow(2).mean(-1, keepdim=True).sqrt()
    return ((outputs.double() - reference) / size)[size[:, 0] > 0]


def error(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """The root mean square of `relative`."""
    return float(relative(outputs, reference).pow(2).mean().sqrt())
