"""Shard sets back to Hugging Face files: names, shapes, types and bytes as in what was cut."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint.description import Checkpoint, Identity, Layer, Tensor
from reshard.convert.together import common_files
from reshard.errors import SourceError
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


@dataclass(frozen=True)
class _Held:
    """A layer of a set, or what a model has once, and where its tensors are read."""

    layer: Layer
    readers: Mapping[str, BlockReader]


def merge(
    sets: Sequence[tuple[Source, Checkpoint]], out: Path, tick: Callable[[int], None] = lambda n: None
) -> list[MergedFile]:
    """Write the tensors of shard sets, each of another part, into a new or empty folder, with index and side files.

    Raises OutputError where the folder holds anything, SourceError where the sets are of two checkpoints.
    """
    side_files = _common(sets)
    held = [
        _Held(layer, {tensor.name: StoredReader(source, tensor) for tensor in layer.stored()})
        for source, checkpoint in sets
        for layer in checkpoint.layers
    ]
    total = sum(checkpoint.nbytes for _, checkpoint in sets)
    with new_folder(out) as folder:
        folder.check_room(side_files, total)
        groups = _groups(held)
        files: list[MergedFile] = []
        weight_map: dict[str, str] = {}
        sinks: list[DirectFile] = []
        for number, layers in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = [tensor for one in layers for tensor in one.layer.stored()]
            readers = {name: reader for one in layers for name, reader in one.readers.items()}
            sinks.append(folder.create(name))
            files.append(_write(sinks[-1], tensors, readers, tick))
            weight_map |= {tensor.name: name for tensor in tensors}
        for source, _ in sets:
            source.check_unchanged()
        for sink in sinks:
            sink.commit()
        for name, data in side_files.items():
            folder.put(name, data)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        folder.put(INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return files


def _common(sets: Sequence[tuple[Source, Checkpoint]]) -> Mapping[str, bytes]:
    """What goes with the merged checkpoint: the sets' own side files, which are alike, or what is true of all of them.

    Raises SourceError where the sets are of two checkpoints, or no tool's files say what they hold.
    """
    (first, one), *others = sets
    for source, other in others:
        if other.part is one.part:
            raise SourceError(f"{first.origin.name} and {source.origin.name} are both sets of {one.part.key}")
        if difference := _other_origin(one.identity, other.identity):
            raise SourceError(
                f"{first.origin.name} and {source.origin.name} were cut from {difference}: a checkpoint is put "
                "together from sets of one; cut them from one, or merge each by itself"
            )
    if all(checkpoint.side_files == one.side_files for _, checkpoint in sets):
        return one.side_files
    return common_files([(source.origin.name, checkpoint) for source, checkpoint in sets])


def _other_origin(one: Identity, other: Identity) -> str | None:
    """Where two sets were cut from, or a file of it, where that is not the same; each names the files that it is of."""
    places = [f"{o.name} at {o.commit}" if o.commit else f"{o.name} ({o.kind})" for o in (one, other)]
    if places[0] != places[1]:
        return " and from ".join(places)
    files = {file.name: file for file in one.files}
    differing = [file.name for file in other.files if files.get(file.name, file) != file]
    return f"{places[0]}, with two {differing[0]}" if differing else None


def _groups(layers: Sequence[_Held]) -> list[list[_Held]]:
    """Whole layers, file by file."""
    groups: list[list[_Held]] = []
    size = 0
    for one in layers:
        nbytes = sum(tensor.nbytes for tensor in one.layer.stored())
        if not groups or size + nbytes > _FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(one)
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
