"""Write a synthetic checkpoint: the files under temporary names first, then their names, the index last."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.synth.plan import SynthFile, SynthOptions, SynthPlan, plan_checkpoint
from reshard.synth.values import blocks
from reshard.writer.folder import OutputFolder, new_folder

Tick = Callable[[int], None]


@dataclass(frozen=True)
class SynthResult:
    """What was written. `tensor_bytes` is the index's total_size, `size` the safetensors files' with their headers."""

    files: int
    tensors: int
    tensor_bytes: int
    size: int


def synthesise(config: Mapping[str, Any], out: Path, options: SynthOptions, tick: Tick = lambda n: None) -> SynthResult:
    """A checkpoint of the model of `config` in a new or empty folder; `tick` is called with the bytes of each step."""
    return write_checkpoint(plan_checkpoint(config, options), out, tick)


def write_checkpoint(plan: SynthPlan, out: Path, tick: Tick = lambda n: None) -> SynthResult:
    """Write a planned checkpoint. Raises OutputError where the folder holds anything; then nothing is written."""
    with new_folder(out) as folder:
        folder.check_space(_disk_bytes(plan))
        _write_all(plan, folder, tick)
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    return SynthResult(len(plan.files), len(tensors), sum(tensor.nbytes for tensor in tensors), plan.size)


def _disk_bytes(plan: SynthPlan) -> int:
    data = sum(len(file.header) for file in plan.files) if plan.options.sparse else plan.size
    return data + sum(len(content) for content in plan.side_files.values())


def _write_all(plan: SynthPlan, folder: OutputFolder, tick: Tick) -> None:
    """All of it or nothing: an unfinished checkpoint without its index would pass for a smaller one."""
    temporaries = [(folder.temporary(file.name), file.name) for file in plan.files]
    try:
        for (temporary, _), file in zip(temporaries, plan.files, strict=True):
            _write(temporary, file, plan.options, tick)
        for temporary, name in temporaries:
            folder.rename(temporary, name)
        for name, content in plan.side_files.items():
            folder.put(name, content)
    except BaseException:
        for temporary, _ in temporaries:
            temporary.unlink(missing_ok=True)
        folder.remove([*(name for _, name in temporaries), *plan.side_files])
        raise


def _write(path: Path, file: SynthFile, options: SynthOptions, tick: Tick) -> None:
    with path.open("xb") as stream:
        stream.write(file.header)
        if options.sparse:
            stream.truncate(file.size)
            tick(file.size)
        else:
            tick(len(file.header))
            for tensor in file.tensors:
                for block in blocks(tensor, options.seed):
                    stream.write(block.data)
                    tick(block.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
