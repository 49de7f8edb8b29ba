"""The shards of one set in one target: which are there already, by their records or by the manifest."""

import contextlib
from collections.abc import Sequence

from reshard.errors import ManifestError, OutputError
from reshard.manifest import Manifest, Record, Shard, parse_manifest, parse_record
from reshard.model.naming import MANIFEST, shard_file
from reshard.plan.manifest_builder import fingerprint, make_manifest
from reshard.plan.pipeline import Prepared
from reshard.plan.plan import Plan
from reshard.sealed import UNSEALED
from reshard.writer.stream import first_difference
from reshard.writer.target import Target, Tick, record_file


class Records:
    """What a target says of the set that is made of a source."""

    def __init__(self, prepared: Prepared, target: Target) -> None:
        self._prepared = prepared
        self._plan = prepared.plan
        self._fingerprint = fingerprint(prepared.checkpoint, prepared.plan, prepared.sample)
        self._target = target

    def manifest(self, shards: Sequence[Shard]) -> Manifest:
        """The set's manifest; shards by rank. What a finished set was cut with stays said."""
        before = parse_manifest(self._target.read(MANIFEST)).parts if self.finished() else ()
        return self._manifest(shards, (*before, *self._prepared.parts))

    def _manifest(self, shards: Sequence[Shard], parts: Sequence[str]) -> Manifest:
        return make_manifest(self._prepared.checkpoint, self._plan, self._prepared.sample, shards, parts)

    def put(self, shard: Shard) -> None:
        """Say that a shard is finished."""
        record = Record(blake3=UNSEALED, fingerprint=self._fingerprint, shard=shard).sealed()
        self._target.put(record_file(shard.file), record.to_json())

    def finished(self) -> bool:
        """Whether the set has its manifest."""
        return MANIFEST in self._target.files()

    def check_repair(self, shard: Shard) -> None:
        """Raises OutputError where a finished set's manifest, which stands meanwhile, promises another shard."""
        if self.finished() and shard not in parse_manifest(self._target.read(MANIFEST)).shards:
            raise OutputError(
                f"{self._target.address}: holds a finished set of another source: {shard.file} is not what this source "
                "gives; choose another folder, or --overwrite it"
            )

    def is_kept(self, shard: Shard, tick: Tick) -> bool:
        """Whether a shard that an earlier run finished is whole, and what the source gives now.

        A record tells the set apart by a sample of the source's bytes, which proves nothing: what the shard is made of
        is read and hashed again, unless the source is a commit, whose bytes cannot change. tick: called at each step.
        Raises OutputError where a finished set is of other bytes.
        """
        if self._prepared.source.origin.commit is None:
            differing = first_difference(self._plan.shards[shard.tp_rank], shard, self._prepared.readers, tick)
            if differing is not None and self.finished():
                raise OutputError(
                    f"{self._target.address}: holds a finished set of another source: {differing} in {shard.file} is "
                    "not what this source gives; choose another folder, or --overwrite it"
                )
            if differing is not None:
                return False
        return self._target.holds(shard, tick)

    def found(self) -> dict[int, Shard]:
        """The shards in the target that a record of this very set (or its manifest) names, in the size it names."""
        sizes, found = self._target.files(), {}
        if MANIFEST in sizes:
            manifest = parse_manifest(self._target.read(MANIFEST))
            found = {shard.tp_rank: shard for shard in manifest.shards}
            if (manifest.part, manifest.tp_size) != (self._plan.part, self._plan.tp_size):
                raise other_set(self._target, manifest.part, manifest.tp_size, self._plan)
            if manifest != self._manifest(manifest.shards, manifest.parts) or not all(
                map(self._is_planned, manifest.shards)
            ):
                raise OutputError(
                    f"{self._target.address}: holds a finished set of another source or of other options; choose "
                    "another folder, or --overwrite it"
                )
        for rank in range(self._plan.tp_size):
            name = record_file(shard_file(rank, self._plan.tp_size, self._plan.part))
            if rank not in found and name in sizes:
                with contextlib.suppress(ManifestError):  # a damaged record: its shard is written again
                    record = parse_record(self._target.read(name), name)
                    if record.fingerprint == self._fingerprint and self._is_planned(record.shard):
                        found[rank] = record.shard
        return {rank: shard for rank, shard in found.items() if sizes.get(shard.file) == shard.size}

    def _is_planned(self, shard: Shard) -> bool:
        """Whether a shard is what the plan makes of its rank, whatever its digests."""
        planned = self._plan.shards[shard.tp_rank] if shard.tp_rank < self._plan.tp_size else None
        if planned is None or len(planned.tensors) != len(shard.tensors):
            return False
        return planned.entry(shard.blake3, [tensor.blake3 for tensor in shard.tensors]) == shard


def other_set(target: Target, part: str, tp_size: int, plan: Plan) -> OutputError:
    """That a target holds shards of another part, or for another group."""
    theirs, ours = f"tp {tp_size}", f"tp {plan.tp_size}"
    if part != plan.part:
        theirs, ours = f"{part}, {theirs}", f"{plan.part}, {ours}"
    return OutputError(
        f"{target.address}: holds shards of {theirs}, this split is for {ours}; choose another folder, or "
        "--overwrite it"
    )
