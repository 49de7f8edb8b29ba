"""From a source to all that a split needs; everything that can be refused is refused here, with nothing written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from reshard.checkpoint.description import Checkpoint, Tensor
from reshard.convert.rules import KEEP, converted
from reshard.errors import SourceError
from reshard.fit import fit_digest, require
from reshard.manifest import Shard
from reshard.model.parts import Part
from reshard.plan.plan import Plan, PlannedShard, make_plan
from reshard.plan.shared_values import check_shared_values
from reshard.source.base import Range, Source
from reshard.source.open import describe
from reshard.source.shardset import is_shard_set, read_manifest
from reshard.tensors.byte_grid import BlockReader, StoredReader
from reshard.tensors.digests import file_digest
from reshard.workers import Workers

_SAMPLE_ROWS, _SAMPLE_BYTES = 2, 512
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Cut:
    """What to make of a source.

    `weights` and `quant_format`: see reshard.convert.rules; `scheme` and `part`: see describe. `parts`: those that are
    cut into one folder, this one too, by their names; none where it is cut alone.
    """

    tp_size: int
    layout: str = "fused"
    pad: bool = False
    weights: str = KEEP
    quant_format: str = "modelslim"
    scheme: str | None = None
    part: Part | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A cut that can be written. parts: see Cut.

    sample: BLAKE3 of some bytes of every source tensor. Files of one shape have one header whatever they hold; this
    tells them apart without reading them.
    """

    source: Source
    checkpoint: Checkpoint
    plan: Plan
    readers: Mapping[str, BlockReader]
    sample: str
    parts: tuple[str, ...] = ()


def prepare(source: Source, cut: Cut) -> Prepared:
    """Describe, convert, plan and check. Raises a ReshardError for whatever does not fit."""
    stored = describe(source, cut.scheme, cut.part)
    checkpoint = converted(stored, cut.weights, cut.quant_format)
    plan = make_plan(checkpoint, cut.tp_size, cut.layout, cut.pad)
    source.prefetch(_looked_at(source, stored))
    readers = make_readers(source, stored, checkpoint)
    if cut.layout == "fused":
        check_shared_values(checkpoint, lambda tensor: readers[tensor.stored.name])
    return Prepared(source, checkpoint, plan, readers, stored.identity.sample or _sample(source, stored), cut.parts)


def make_readers(source: Source, stored: Checkpoint, checkpoint: Checkpoint) -> dict[str, BlockReader]:
    """A reader for each tensor: of its bytes where they are stored, of its values where they are computed."""
    readers: dict[str, BlockReader] = {
        t.name: StoredReader(source, t, once=True) for t in checkpoint.stored() if t.extents
    }
    if any(not tensor.extents for tensor in checkpoint.tensors()):
        from reshard.convert.compute import computed_readers  # the only way to torch

        readers.update(computed_readers(source, stored, checkpoint))
    return readers


def check_set_digests(source: Source, workers: int) -> None:
    """A shard set that is cut again must be whole: its lineage goes on into the new manifest."""
    if not is_shard_set(source):
        return
    shards = read_manifest(source).shards
    source.prefetch((shard.file, 0, shard.size) for shard in shards)
    pool = Workers(workers, source)

    def check(shard: Shard) -> None:
        digest = file_digest(source, shard.file, tick=pool.tick)
        require(fit_digest(shard.file, digest, shard.blake3), SourceError)

    pool.map(check, shards)


def wanted(prepared: Prepared, shards: Sequence[PlannedShard]) -> Iterator[Range]:
    """What of the source goes into shards, about in the order in which it is asked for when all are written at once."""
    for tensors in zip(*(shard.tensors for shard in shards), strict=True):
        slices = {(s.tensor, s.start): tensor.source_block(s) for tensor in tensors for s in tensor.slices}
        for name, start in sorted(slices):
            yield from prepared.readers[name].ranges(*slices[name, start])


def _looked_at(source: Source, checkpoint: Checkpoint) -> Iterator[Range]:
    """What is read before anything is written: the sample, and small tensors, such as scales."""
    for tensor in checkpoint.stored():
        reader = StoredReader(source, tensor)
        if tensor.nbytes <= _SMALL_BYTES:
            yield from reader.ranges(0, 0, tensor.rows, tensor.row_bytes)
        else:
            for block in _sampled(tensor):
                yield from reader.ranges(*block)


def _sampled(tensor: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Blocks at a tensor's start, middle and end: (row, column, rows, bytes)."""
    rows, width = min(tensor.rows, _SAMPLE_ROWS), min(tensor.row_bytes, _SAMPLE_BYTES)
    below, beside = tensor.rows - rows, tensor.row_bytes - width
    for row, column in ((0, 0), (below // 2, beside // 2), (below, beside)):
        yield row, column, rows, width


def _sample(source: Source, checkpoint: Checkpoint) -> str:
    """Of each tensor's sampled blocks, in the order of the names: the same however files divide them."""
    hasher = blake3()
    for tensor in sorted(checkpoint.stored(), key=lambda tensor: tensor.name):
        for row, column, rows, width in _sampled(tensor):
            out = np.empty((rows, width), np.uint8)
            StoredReader(source, tensor).read(out, row, column)
            hasher.update(out.data)
    return hasher.hexdigest()
