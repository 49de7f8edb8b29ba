"""The split itself: shards by several threads, then the manifest.

Each worker takes a rank at a time and streams its file front to back. A finished shard gets its name and a record;
when every rank's is there, the manifest takes the records over and the set is complete.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from reshard.digests import file_digest
from reshard.errors import ManifestError, OutputError
from reshard.manifest import Manifest, Record, Shard, parse_manifest, parse_record
from reshard.naming import MANIFEST, shard_file
from reshard.plan import Plan, PlannedShard
from reshard.prepare import Prepared, wanted
from reshard.record import fingerprint, make_manifest, make_shard
from reshard.source.base import Cancelled
from reshard.source.folder import FolderSource
from reshard.writer.folder import OutputFolder, os_errors, record_file
from reshard.writer.lock import Lock, locked
from reshard.writer.stream import ShardStream

# More than this machine's cores: while one waits for the disk, another cuts and hashes.
DEFAULT_WORKERS = min(8, 2 * len(os.sched_getaffinity(0)))

Tick = Callable[[int], None]


@dataclass(frozen=True)
class SplitOptions:
    """How a split treats its output folder. `ranks`: those to write, None for all."""

    ranks: tuple[int, ...] | None = None
    resume: bool = False
    overwrite: bool = False
    workers: int = DEFAULT_WORKERS


@dataclass(frozen=True)
class SplitResult:
    """What was written, what was kept from an earlier run, and which ranks the set still lacks."""

    written: tuple[Shard, ...]
    kept: tuple[Shard, ...]
    missing: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether the set has its manifest."""
        return not self.missing


def write_shards(prepared: Prepared, out: Path, options: SplitOptions, tick: Tick = lambda n: None) -> SplitResult:
    """Write a plan's shards; `tick` is called with the bytes of each step.

    Raises OutputError before anything is written where the folder does not allow it.
    """
    plan = prepared.plan
    folder = OutputFolder(out)
    ranks = options.ranks if options.ranks is not None else tuple(range(plan.tp_size))
    _check_folder(folder, plan, ranks, options)
    try:
        with os_errors(out):
            folder.create()
        with os_errors(out), locked(out, options.ranks) as lock:
            # Again, now that no other run can change it.
            _check_folder(folder, plan, ranks, options)
            folder.remove_temporaries(options.ranks)
            return _Run(prepared, folder, options, tick).run(ranks, lock)
    finally:
        folder.remove_own_temporaries()
        folder.remove_if_created()


def _check_folder(folder: OutputFolder, plan: Plan, ranks: Collection[int], options: SplitOptions) -> None:
    contents = folder.contents()
    if contents.foreign:
        raise OutputError(
            f"{folder.path}: holds {contents.foreign[0]}, which is no part of a shard set; choose an empty folder"
        )
    if options.overwrite:
        if contents.finished and options.ranks is not None:
            raise OutputError(
                f"{folder.path}: holds a finished set, which --overwrite replaces as a whole; leave --ranks out, or "
                "choose another folder"
            )
        return
    if contents.finished and not options.resume:
        raise OutputError(f"{folder.path}: holds a finished shard set; choose another folder, or --overwrite it")
    other = sorted(size for _, size in contents.shards if size != plan.tp_size)
    # Of a set that this one replaced: an overwrite was cut off, and is gone on with.
    if other and not (options.resume and (contents.replaced or contents.finished)):
        raise _other_size(folder, other[0], plan)
    there = sorted(rank for rank, _ in contents.shards if rank in ranks)
    if there and not options.resume:
        raise OutputError(
            f"{folder.path}: holds rank {there[0]}'s shard of an unfinished set; go on with --resume, or start anew "
            "with --overwrite"
        )


def _other_size(folder: OutputFolder, tp_size: int, plan: Plan) -> OutputError:
    return OutputError(
        f"{folder.path}: holds shards of tp {tp_size}, this split is for tp {plan.tp_size}; choose another folder, or "
        "--overwrite it"
    )


class _Run:
    """One split into one folder."""

    def __init__(self, prepared: Prepared, folder: OutputFolder, options: SplitOptions, tick: Tick) -> None:
        self._prepared = prepared
        self._checkpoint = prepared.checkpoint
        self._plan = prepared.plan
        self._readers = prepared.readers
        self._sample = prepared.sample
        self._fingerprint = fingerprint(prepared.checkpoint, prepared.plan, prepared.sample)
        self._folder = folder
        self._options = options
        self._tick = tick
        self._stop = threading.Event()

    def run(self, ranks: Sequence[int], lock: Lock) -> SplitResult:
        kept = self._kept(ranks) if self._options.resume else {}
        todo = [self._plan.shards[rank] for rank in ranks if rank not in kept]
        self._folder.check_space(sum(shard.size for shard in todo))
        self._prepared.source.prefetch(wanted(self._prepared, todo))
        # A finished set stays whole until every new shard is durable; then they change places.
        staged = self._folder.contents().finished and self._options.overwrite
        written = self._write(todo, staged)
        done = {**kept, **{shard.tp_rank: shard for shard in written}}
        missing = self._finish(done) if lock.finish() else self._others(done)
        return SplitResult(tuple(written), tuple(kept.values()), missing)

    def _write(self, todo: Sequence[PlannedShard], staged: bool) -> list[Shard]:
        """Write shards with several threads. What is not finished when one fails is removed."""
        durable: list[tuple[Path, Shard]] = []  # written and not yet under their names
        written: list[Shard] = []
        futures: list[Future[tuple[Path, Shard]]] = []
        with ThreadPoolExecutor(self._options.workers, thread_name_prefix="reshard") as pool:
            try:
                futures += [pool.submit(self._write_shard, shard) for shard in todo]
                for future in as_completed(futures):
                    durable.append(future.result())
                    if not staged:
                        written.append(self._commit(*durable.pop()))
            except BaseException:
                self._stop.set()
                self._prepared.source.cancel()
                pool.shutdown(cancel_futures=True)
                # What stopped the first worker, not how the others took it.
                for future in futures:
                    if not future.cancelled() and not isinstance(future.exception(), Cancelled | None):
                        future.result()
                raise
        if staged:
            self._folder.take_manifest_away()
        written += [self._commit(temporary, shard) for temporary, shard in durable]
        return sorted(written, key=lambda shard: shard.tp_rank)

    def _write_shard(self, planned: PlannedShard) -> tuple[Path, Shard]:
        stream = ShardStream(self._folder.temporary(planned.file))
        try:
            stream.write(planned.header)
            digests = [stream.write_tensor(tensor, self._readers, self._advance) for tensor in planned.tensors]
            size, digest = stream.close()
        except BaseException:
            stream.discard()
            self._stop.set()
            raise
        return stream.path, make_shard(planned, size, digest, digests)

    def _advance(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        self._tick(nbytes)

    def _commit(self, temporary: Path, shard: Shard) -> Shard:
        self._folder.commit(temporary, shard.file)
        record = Record(fingerprint=self._fingerprint, shard=shard)
        self._folder.put(record_file(shard.file), (record.model_dump_json(indent=1) + "\n").encode())
        return shard

    def _kept(self, ranks: Collection[int]) -> dict[int, Shard]:
        """The shards of these ranks that earlier runs finished, that are of this very set, and whole."""
        with FolderSource(self._folder.path) as there:
            recorded = {rank: shard for rank, shard in self._recorded(there).items() if rank in ranks}
            return {rank: s for rank, s in recorded.items() if file_digest(there, s.file) == s.blake3}

    def _recorded(self, there: FolderSource) -> dict[int, Shard]:
        """The shards in the folder that a record of this very set (or its manifest) names, in the size it names."""
        sizes, found = there.files(), {}
        if MANIFEST in sizes:
            manifest = parse_manifest(there.read(MANIFEST, 0, sizes[MANIFEST]))
            found = {shard.tp_rank: shard for shard in manifest.shards}
            if manifest.tp_size != self._plan.tp_size:
                raise _other_size(self._folder, manifest.tp_size, self._plan)
            if manifest != self._manifest(manifest.shards) or not all(map(self._is_planned, manifest.shards)):
                raise OutputError(
                    f"{self._folder.path}: holds a finished set of another source or of other options; choose another "
                    "folder, or --overwrite it"
                )
        for rank in range(self._plan.tp_size):
            name = record_file(shard_file(rank, self._plan.tp_size))
            if rank not in found and name in sizes:
                with contextlib.suppress(ManifestError):  # a damaged record: its shard is written again
                    record = parse_record(there.read(name, 0, sizes[name]), name)
                    if record.fingerprint == self._fingerprint and self._is_planned(record.shard):
                        found[rank] = record.shard
        return {rank: shard for rank, shard in found.items() if sizes.get(shard.file) == shard.size}

    def _is_planned(self, shard: Shard) -> bool:
        """Whether a shard is what the plan makes of its rank, whatever its digests."""
        planned = self._plan.shards[shard.tp_rank] if shard.tp_rank < self._plan.tp_size else None
        if planned is None or len(planned.tensors) != len(shard.tensors):
            return False
        return make_shard(planned, planned.size, shard.blake3, [t.blake3 for t in shard.tensors]) == shard

    def _manifest(self, shards: Sequence[Shard]) -> Manifest:
        return make_manifest(self._checkpoint, self._plan, self._sample, shards)

    def _others(self, done: Mapping[int, Shard]) -> tuple[int, ...]:
        return tuple(rank for rank in range(self._plan.tp_size) if rank not in done)

    def _finish(self, done: Mapping[int, Shard]) -> tuple[int, ...]:
        """Write the manifest if every rank's shard is there. Returns the ranks that are not."""
        with FolderSource(self._folder.path) as there:
            # Our own as they are there now: another run may have replaced one since.
            shards = {rank: s for rank, s in self._recorded(there).items() if rank not in done or done[rank] == s}
        if len(shards) == self._plan.tp_size:
            shards = {**self._kept(self._others(done)), **done}
        missing = self._others(shards)
        if missing:
            return missing
        self._folder.remove_temporaries((None,))
        for name, data in sorted(self._checkpoint.side_files.items()):
            self._folder.put(name, data)
        ordered = [shards[rank] for rank in range(self._plan.tp_size)]
        self._folder.put(MANIFEST, self._manifest(ordered).to_json())
        self._folder.remove_stale({MANIFEST, *self._checkpoint.side_files, *(s.file for s in self._plan.shards)})
        return ()
