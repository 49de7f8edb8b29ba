"""All checks and figures, scheme by scheme."""

import platform

import torch

from reshard_runtime.kernels.cuda import CudaKernels
from tests.cuda.forward import check_collectives, check_groups, check_ranks
from tests.cuda.kernels import check_products, check_refused, check_vectors
from tests.cuda.layers import SCHEMES, Sizes, make_layer
from tests.cuda.report import Report
from tests.cuda.speed import Loaded, bandwidth, decode

_PRODUCTS = ("bf16", "w8a8_dynamic")  # static has the same
_LOADED = _PRODUCTS
_COPIED, _COPIED_HERE = 1 << 30, 1 << 24


def run(device: str, sizes: Sizes) -> Report:
    """Everything that the device allows: graphs are a GPU's alone, and so is nccl."""
    generator = torch.Generator(device).manual_seed(0)
    on_gpu, kernels = device == "cuda", CudaKernels()
    report = Report(_machine(device))
    bytes_s = bandwidth(device, sizes.rounds, _COPIED if on_gpu else _COPIED_HERE)
    report.machine["copies within it"] = f"{bytes_s / 1e9:,.0f} GB/s"
    report.add("sizes that are refused", check_refused(kernels, device))
    report.add("kernels between the products", check_vectors(kernels, sizes, generator))
    report.add("collectives", check_collectives(kernels, generator))
    for scheme in SCHEMES:
        layer = make_layer(scheme, sizes, generator)
        if scheme in _PRODUCTS:
            report.add(f"products, {scheme}", check_products(kernels, layer, generator))
        report.add(f"ranks one after another, {scheme}", check_ranks(layer, generator))
        report.add(f"groups of one, {scheme}", check_groups(layer, generator))
        if on_gpu:
            from tests.cuda.graphs import check_graphs

            report.add(f"graphs, {scheme}", check_graphs(layer, generator))
        report.figure("a decode step's products, three layers, T tokens a rank", decode(layer, bytes_s, generator))
        del layer
    for scheme in _LOADED:
        loaded = Loaded(scheme, sizes, device)
        report.figure("load_shard, rank 3 of 8, from the page cache", loaded.figures())
        report.add(f"what is loaded, {scheme}", loaded.checks())
    return report


def _machine(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    if device == "cpu":
        return {"device": "cpu", **versions}
    card = torch.cuda.get_device_properties(0)
    memory = f"{card.total_memory / 2**30:.0f} GiB"
    return {"device": f"{card.name} ({memory})", **versions, "CUDA": str(torch.version.cuda)}
