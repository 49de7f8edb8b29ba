"""Write a synthetic checkpoint: the files under temporary names first, then their names, the index last."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reshard.synth.plan import SynthFile, SynthOptions, SynthPlan
from reshard.synth.values import blocks
from reshard.writer.folder import new_folder

Tick = Callable[[int], None]


@dataclass(frozen=True)
class SynthResult:
    """What was written. `tensor_bytes` is the index's total_size, `size` the safetensors files' with their headers."""

    files: int
    tensors: int
    tensor_bytes: int
    size: int


def write_checkpoint(plan: SynthPlan, out: Path, tick: Tick = lambda n: None) -> SynthResult:
    """Write a planned checkpoint into a new or empty folder; `tick` is called with the bytes of each step.

    All of it or nothing: an unfinished checkpoint without its index would pass for a smaller one. Raises OutputError
    where the folder holds anything.
    """
    with new_folder(out) as folder:
        data = sum(len(file.header) if plan.options.sparse else file.size for file in plan.files)
        folder.check_room(plan.side_files, data + sum(map(len, plan.side_files.values())))
        try:
            temporaries = [folder.temporary(file.name) for file in plan.files]
            for temporary, file in zip(temporaries, plan.files, strict=True):
                _write(temporary, file, plan.options, tick)
            for temporary, file in zip(temporaries, plan.files, strict=True):
                folder.rename(temporary, file.name)
            for name, content in plan.side_files.items():
                folder.put(name, content)
        except BaseException:
            folder.remove([*(file.name for file in plan.files), *plan.side_files])
            raise
    tensors = [tensor for file in plan.files for tensor in file.tensors]
    return SynthResult(len(plan.files), len(tensors), sum(tensor.nbytes for tensor in tensors), plan.size)


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
