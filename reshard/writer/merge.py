"""A shard set back to Hugging Face files: names, shapes, types and bytes as in what was cut."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint.description import Checkpoint, Layer, Tensor
from reshard.manifest import Slice
from reshard.plan.plan import PlannedTensor
from reshard.source.base import Source
from reshard.tensors.byte_grid import BlockReader, StoredReader
from reshard.tensors.header import encode_header
from reshard.writer.file import DirectFile
from reshard.writer.folder import new_folder
from reshard.writer.stream import ShardStream

INDEX = "model.safetensors.index.json"
_FILE_BYTES = 5_000_000_000  # a file is closed when the next layer would take it past this, as transformers does
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class MergedFile:
    """A file that was written."""

    name: str
    size: int
    blake3: str
    tensors: int


def merge(
    source: Source, checkpoint: Checkpoint, out: Path, tick: Callable[[int], None] = lambda n: None
) -> list[MergedFile]:
    """Write a shard set's tensors into a new or empty folder, with index, config.json and description.

    Raises OutputError where the folder holds anything.
    """
    with new_folder(out) as folder:
        folder.check_room(checkpoint.side_files, checkpoint.nbytes)
        readers = {tensor.name: StoredReader(source, tensor) for tensor in checkpoint.stored()}
        groups = _groups(checkpoint.layers)
        files: list[MergedFile] = []
        weight_map: dict[str, str] = {}
        sinks: list[DirectFile] = []
        for number, layers in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = [tensor for layer in layers for tensor in layer.stored()]
            sinks.append(folder.create(name))
            files.append(_write(sinks[-1], tensors, readers, tick))
            weight_map |= {tensor.name: name for tensor in tensors}
        source.check_unchanged()
        for sink in sinks:
            sink.commit()
        for name, data in checkpoint.side_files.items():
            folder.put(name, data)
        index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        folder.put(INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return files


def _groups(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Whole layers, file by file."""
    groups: list[list[Layer]] = []
    size = 0
    for layer in layers:
        nbytes = sum(tensor.nbytes for tensor in layer.stored())
        if not groups or size + nbytes > _FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += nbytes
    return groups


def _write(
    sink: DirectFile,
    tensors: Sequence[Tensor],
    readers: Mapping[str, BlockReader],
    tick: Callable[[int], None],
) -> MergedFile:
    entries = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    stream = ShardStream(sink)
    try:
        stream.write(encode_header(entries, {"format": "pt"}, _HEADER_ALIGNMENT))
        for tensor in tensors:
            whole = Slice(tensor=tensor.name, shape=tensor.shape, dim=0, start=0, stop=tensor.rows, at=0)
            stream.write_tensor(PlannedTensor(tensor.name, tensor.dtype, tensor.shape, (whole,)), readers, tick)
        size, digest = stream.close()
    except BaseException:
        sink.discard()
        raise
    return MergedFile(sink.name, size, digest, len(tensors))
