"""How fast this machine runs the runtime's kernels and exchanges: a rank of a group that all measure at once.

`python -m reshard_runtime.measure PROCESSES THREADS` prints what each of them found, a JSON object: seconds, and bytes
or operations a second, each from the shortest of several runs, which other work on the machine disturbed least. The
ranks work at the same time, as they do when they serve, so that what they share (memory, caches) is shared here too.
"""

import json
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from reshard.cli.options import Debug
from reshard.cli.output import Output
from reshard.model.activation import SILU, Activation
from reshard_runtime.kernels.cpu import CpuKernels
from reshard_runtime.processes import program, rank_output, spawn

# A quarter of DeepSeek-R1's gate_up_proj: 264 MB as float32, 66 MB as int8, more than a share of any cache.
_ROWS, _COLUMNS = 9216, 7168
# Between the two, a product's time grows by a line (1 to 256 tokens, AVX-512): so much for the weights, which a thread
# reads and multiplies one after another, and so much for each token.
_FEW_TOKENS, _MANY_TOKENS = 8, 128
_STREAM_ELEMENTS = 1 << 26
_MESSAGE_BYTES = 1 << 22
_ROUNDS, _CALLS, _EXCHANGES = 12, 200, 200
_TIMEOUT = timedelta(seconds=120)


def measure(group: dist.ProcessGroup) -> dict[str, float]:
    """The figures of this rank; every rank of the group calls it."""
    with torch.inference_mode():
        return {**_memory(group), **_products(group), **_kernel_costs(group), **_collectives(group)}


def _memory(group: dist.ProcessGroup) -> dict[str, float]:
    """Bytes a second of a sum over float32, which reads each of them once."""
    values = torch.ones(_STREAM_ELEMENTS)
    return {"memory_bytes_s": values.nbytes / _shortest(group, values.sum)}


def _products(group: dist.ProcessGroup) -> dict[str, float]:
    """Weight bytes a second without tokens, operations a second without weights: the line through two counts."""
    kernels, found = CpuKernels(), {}
    multiplied = {"bf16": (torch.bfloat16, kernels.linear), "int8": (torch.int8, kernels.int8_matmul)}
    for name, (dtype, multiply) in multiplied.items():
        plain = torch.ones(_ROWS, _COLUMNS, dtype=dtype)
        weight = kernels.weight(name, plain)
        few, many = (
            _shortest(group, partial(multiply, torch.ones(tokens, _COLUMNS, dtype=dtype), weight))
            for tokens in (_FEW_TOKENS, _MANY_TOKENS)
        )
        token = (many - few) / (_MANY_TOKENS - _FEW_TOKENS)
        found[f"{name}_weight_bytes_s"] = plain.nbytes / max(few - _FEW_TOKENS * token, few / _FEW_TOKENS)
        found[f"{name}_operations_s"] = 2 * plain.numel() / max(token, many / _MANY_TOKENS / 2)
    return found


def _kernel_costs(group: dist.ProcessGroup) -> dict[str, float]:
    """Seconds of a call with next to nothing to do."""
    kernels, small = CpuKernels(), torch.ones(1, 32, dtype=torch.bfloat16)
    weight, gated = kernels.weight("", torch.ones(32, 32, dtype=torch.bfloat16)), kernels.gated(Activation(SILU))
    return {
        "matmul_s": _shortest(group, lambda: kernels.linear(small, weight), _CALLS),
        "vector_s": _shortest(group, lambda: gated(small), _CALLS),
    }


def _collectives(group: dist.ProcessGroup) -> dict[str, float]:
    """A gather of a byte, and bytes a second of a large one, as the runtime's layers exchange tokens here."""
    gather = CpuKernels().collectives(group).gather
    byte, message = torch.zeros(1, 1, dtype=torch.int8), torch.zeros(1, _MESSAGE_BYTES, dtype=torch.int8)
    smallest = _shortest(group, lambda: gather(byte), _EXCHANGES)
    largest = _shortest(group, lambda: gather(message))
    received = (group.size() - 1) * _MESSAGE_BYTES
    return {
        "gather_s": smallest,
        "link_bytes_s": received / max(largest - smallest, 1e-9),
    }


def _shortest(group: dist.ProcessGroup, call: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, of several one after another, all ranks at once; the first round does not count."""
    took = []
    for _ in range(_ROUNDS + 1):
        dist.barrier(group)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        took.append(time.perf_counter() - start)
    return min(took[1:]) / calls


def _rank(rank: int, size: int, threads: int, folder: str, debug: bool) -> None:
    """Meet the others in a folder, measure, and leave the figures there."""
    with rank_output(rank, size, debug):
        torch.set_num_threads(threads)
        meeting = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=_TIMEOUT)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(measure(dist.group.WORLD)))
        dist.destroy_process_group()


def main(
    processes: Annotated[int, typer.Argument(min=2)],
    threads: Annotated[int, typer.Argument(min=1)],
    debug: Debug = False,
) -> None:
    """Measure in processes of their own; where one fails, the others are ended."""
    output = Output("human", quiet=True, debug=debug)
    with output.errors(), tempfile.TemporaryDirectory() as folder:
        spawn(_rank, processes, processes, threads, folder, debug)
        output.json([json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)])


if __name__ == "__main__":
    program(main)
