"""Programs that split layers and end, each many times: python -m tests.support.ends SHARDS FOLDER PAIRS PROGRAM...

Prints {program: the exit codes}, a pair of ranks after another. All are forked from one process that has imported
everything, and end as any Python program does. Before the last call their machine becomes as busy as can be: gloo's
threads run only where nothing else wants the processor, and do not get Python's lock unless it is given up.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reshard_runtime import DenseFFN, demo, load_shard, measure
from reshard_runtime.kernels import cpu
from reshard_runtime.serving.transformers import attach
from reshard_runtime.serving.vllm.groups import Group
from tests.support import measure_little  # noqa: F401 - it makes `measure` little

HIDDEN, INTERMEDIATE, LAYERS = 256, 512, 2
_AT_ONCE = 4
_held: list[Any] = []
"""What a program's globals hold when it ends."""
_itself = sys.modules[__name__]  # without, nothing clears these globals: the collector passes over what is frozen


class _MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(HIDDEN, INTERMEDIATE, False).bfloat16() for _ in range(2))
        self.down_proj = torch.nn.Linear(INTERMEDIATE, HIDDEN, False).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp: torch.nn.Module = _MLP()


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer() for _ in range(LAYERS))


class _Pause:
    """Makes the interpreter's end long enough for gloo's threads to run in it."""

    def __init__(self) -> None:
        self._sleep = time.sleep

    def __del__(self) -> None:
        self._sleep(0.2)


def _make_busy() -> None:
    own = threading.get_native_id()
    processor = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, processor)
        if thread != own:
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
    sys.setswitchinterval(60)
    globals()["_pause"] = _Pause()


def _run(ffn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x_TH = torch.ones(3, HIDDEN, dtype=torch.bfloat16)
    ffn(x_TH)
    _make_busy()
    ffn(x_TH)


def _layer(shards: Path) -> None:
    ffn = DenseFFN(load_shard(shards, dist.get_rank()).layer(0), dist.group.WORLD)
    _held.append(ffn)
    _run(ffn)


def _group_first(shards: Path) -> None:
    _layer(shards)
    dist.destroy_process_group()


def _layers_first(shards: Path) -> None:
    _layer(shards)
    _held.clear()
    dist.destroy_process_group()


def _group_held(shards: Path) -> None:
    _held.append(dist.group.WORLD)
    _layer(shards)
    dist.destroy_process_group()


def _attached(shards: Path) -> None:
    model = _Model()
    attach(model, shards, dist.group.WORLD)
    _held.append(model)
    _run(model.layers[0].mlp)
    dist.destroy_process_group()


def _plugin(shards: Path) -> None:
    group = Group(dist.group.WORLD, dist.group.WORLD, 0)
    _held.append(group)
    _run(lambda x_TH: group.meet(cpu.CpuKernels().collectives(group.data).gather, x_TH))
    dist.destroy_process_group()


PROGRAMS: dict[str, Callable[[Path], None]] = {
    "the group first": _group_first,
    "the layers first": _layers_first,
    "neither": _layer,
    "the group held by the program": _group_held,
    "attach": _attached,
    "the plugin's group": _plugin,
}
"""In a group of two."""

COMMANDS: dict[str, Callable[[int, Path, Path], None]] = {
    "demo": lambda rank, folder, shards: demo._process(
        rank, 2, f"file://{folder}/ranks", folder, shards, 8, "cpu", False
    ),
    "measure": lambda rank, folder, shards: measure._rank(rank, 2, 1, str(folder), False),
}
"""What their processes do."""


def _program(name: str, rank: int, folder: Path, shards: Path) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # which is for the codes
    if name in COMMANDS:
        COMMANDS[name](rank, folder, shards)
        return
    vars(cpu)["links_of"] = lambda group: None  # as on two hosts, where tokens travel by gloo
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    PROGRAMS[name](shards)


def main() -> None:
    """Or, in a process that was forked, the program, whose end is then the interpreter's."""
    shards, within, (pairs, *names) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    gc.freeze()  # the end of a forked process takes a third of the time
    codes: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        for first in range(0, int(pairs), _AT_ONCE):
            started = []
            for pair in range(first, min(int(pairs), first + _AT_ONCE)):
                folder = within / f"{name}-{pair}"
                folder.mkdir()
                for rank in range(2):
                    process = os.fork()
                    if process == 0:
                        _program(name, rank, folder, shards)
                        return
                    started.append(process)
            codes[name] += [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    sys.stdout.write(json.dumps(codes))


if __name__ == "__main__":
    main()
