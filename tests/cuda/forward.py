"""Whole layers: the ranks' parts, one after another on the one device, and `DenseFFN` in groups of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from reshard_runtime import DenseFFN
from reshard_runtime.kernels import Kernels
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.kernels.cuda import CudaKernels
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import LayerShard
from tests.cuda.kernels import BF16
from tests.cuda.layers import Layer, floats, integers
from tests.cuda.report import Check, alike, exact, near

_TOKENS = 24
# A rank quantizes its own slice of what is between the matrices, by the slice's own maximum: int8's rounding differs.
_OF_SUM = {"bf16": BF16, "w8a8_dynamic": 2.0**-3, "w8a8_static": BF16}
# Two backends round some of those values to another BF16 number, or level.
_OF_RANK = {"bf16": 2.0**-6, "w8a8_dynamic": 2.0**-5, "w8a8_static": 2.0**-5}
# One process's group needs no network, and may find none.
for _variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
    os.environ.setdefault(_variable, "lo")
_TIMEOUT = timedelta(seconds=60)


def check_ranks(layer: Layer, generator: torch.Generator) -> Iterator[Check]:
    """Every rank's partial sums against the CPU's, and all of them against the unsplit layer."""
    x_TH = floats(generator, _TOKENS, layer.sizes.hidden)
    on_cpu, ranks = layer.to("cpu"), layer.sizes.ranks
    total = torch.zeros(x_TH.shape, device=generator.device)
    for rank in range(ranks):
        found = _partial(CudaKernels(), layer.shard(rank, ranks), x_TH)
        wanted = _partial(CpuKernels(), on_cpu.shard(rank, ranks), x_TH.cpu())
        name = f"{layer.scheme}: rank {rank} of {ranks}, as on the CPU"
        yield near(name, found, wanted, BF16, _OF_RANK[layer.scheme])
        total += found
    unsplit = _partial(CudaKernels(), layer.shard(0, 1), x_TH)
    yield alike(f"{layer.scheme}: {ranks} ranks added up, as unsplit", total, unsplit, _OF_SUM[layer.scheme])


def _partial(kernels: Kernels, shard: LayerShard, x_TH: torch.Tensor) -> torch.Tensor:
    ffn = PartialFFN(shard, kernels, torch.bfloat16, "dynamic")
    with torch.no_grad():
        return ffn.forward_packed(ffn.pack(x_TH), torch.float32)


def check_groups(layer: Layer, generator: torch.Generator) -> Iterator[Check]:
    """`DenseFFN` in a group of one gives what it gives without a group, over every backend that the device has."""
    x_TH = floats(generator, _TOKENS, layer.sizes.hidden)
    whole = layer.shard(0, 1)
    wanted = DenseFFN(whole, kernels=CudaKernels())(x_TH)
    for backend in ("gloo", "nccl") if x_TH.is_cuda else ("gloo",):
        with group_of_one(backend) as group:
            ffn = DenseFFN(whole, group, kernels=CudaKernels())
            yield exact(f"{layer.scheme}: DenseFFN over {backend}, R = 1", ffn(x_TH), wanted)


def check_collectives(kernels: Kernels, generator: torch.Generator) -> Iterator[Check]:
    """Of the device's own kind, in a group of one: what goes out comes back."""
    backend = "nccl" if generator.device.type == "cuda" else "gloo"
    with group_of_one(backend) as group:
        travel = kernels.collectives(group)
        for rows in (integers(generator, _TOKENS, 44), floats(generator, _TOKENS, 44)):
            name = f"{backend}, R = 1, {rows.dtype}"
            yield exact(f"gather: {name}", travel.gather(rows.clone()), rows)
            if rows.is_floating_point():
                yield exact(f"reduce_scatter: {name}", travel.reduce_scatter(rows.clone()).to(rows.dtype), rows)
                yield exact(f"all_reduce: {name}", travel.all_reduce(rows.clone()).to(rows.dtype), rows)


@contextmanager
def group_of_one(backend: str) -> Iterator[dist.ProcessGroup]:
    """This process's own."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1, timeout=_TIMEOUT)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()
