"""The split itself: shards by several threads, and processes, then the manifest.

Each worker takes a rank at a time and streams its file front to back. A finished shard gets its name and a record;
when every rank's is there, the manifest takes the records over and the set is complete.
"""

import contextlib
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import OutputError
from reshard.interruptible import interruptible, raise_first
from reshard.manifest import Shard
from reshard.model.naming import MANIFEST
from reshard.plan.pipeline import Prepared, wanted
from reshard.plan.plan import Plan, PlannedShard
from reshard.source.base import Cancelled
from reshard.writer.kept import Keeping
from reshard.writer.open import open_target
from reshard.writer.records import Records, other_size
from reshard.writer.stream import ShardStream
from reshard.writer.target import Sink, Target, Turn, stale
from reshard.writer.team import Alone, Team, Tick, share

# More than this machine's cores: while one waits for the disk, another cuts and hashes.
DEFAULT_WORKERS = min(8, 2 * len(os.sched_getaffinity(0)))
_APPEARING_SECONDS = 10.0  # a shared folder may show late what another host has put there


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


def write_shards(
    prepared: Prepared,
    out: Target | Path | str,
    options: SplitOptions,
    tick: Tick = lambda n: None,
    team: Team | None = None,
) -> SplitResult:
    """Write a plan's shards to a folder or an fsspec address; `tick` is called with the bytes of each step.

    In a team each process writes its share of the ranks, the result is the whole team's, and its `show` takes the
    place of `tick`. Raises OutputError before anything is written where the target does not allow it.
    """
    plan = prepared.plan
    target = open_target(out) if isinstance(out, Path | str) else out
    team = team or Alone(tick)
    ranks = share(options.ranks if options.ranks is not None else tuple(range(plan.tp_size)), team.place)
    claimed = options.ranks if team.place.size == 1 else ranks
    _check_contents(target, plan, ranks, options)
    team.exchange(None)  # nobody writes before all may
    with contextlib.ExitStack() as held:
        turn = held.enter_context(target.writing(claimed))
        # Again, now that no other run can change it.
        _check_contents(target, plan, ranks, options)
        target.remove_temporaries(claimed)
        run = _Run(prepared, target, options, team)
        written, kept = run.write(ranks)
        if not team.place.leads:
            held.close()
        written_by, kept_by = zip(*team.exchange((written, kept)), strict=True)
        missing = run.complete(turn, written_by, kept_by) if team.place.leads else ()
        (missing, *_) = team.exchange(missing)
    return SplitResult(_by_rank(written_by), _by_rank(kept_by), missing)


def _by_rank(of_processes: Collection[Sequence[Shard]]) -> tuple[Shard, ...]:
    return tuple(sorted((s for shards in of_processes for s in shards), key=lambda shard: shard.tp_rank))


def _check_contents(target: Target, plan: Plan, ranks: Collection[int], options: SplitOptions) -> None:
    contents = target.contents()
    if contents.foreign:
        raise OutputError(
            f"{target.address}: holds {contents.foreign[0]}, which is no part of a shard set; choose an empty folder"
        )
    if options.overwrite:
        if contents.finished and options.ranks is not None:
            raise OutputError(
                f"{target.address}: holds a finished set, which --overwrite replaces as a whole; leave --ranks out, or "
                "choose another folder"
            )
        return
    if contents.finished and not options.resume:
        raise OutputError(f"{target.address}: holds a finished shard set; choose another folder, or --overwrite it")
    other = sorted(size for _, size in contents.shards if size != plan.tp_size)
    # Of a set that this one replaced: an overwrite was cut off, and is gone on with.
    if other and not (options.resume and (contents.replaced or contents.finished)):
        raise other_size(target, other[0], plan)
    there = sorted(rank for rank, _ in contents.shards if rank in ranks)
    if there and not options.resume:
        raise OutputError(
            f"{target.address}: holds rank {there[0]}'s shard of an unfinished set; go on with --resume, or start anew "
            "with --overwrite"
        )


class _Run:
    """One process's part of a split."""

    def __init__(self, prepared: Prepared, target: Target, options: SplitOptions, team: Team) -> None:
        self._prepared = prepared
        self._plan = prepared.plan
        self._records = Records(prepared, target)
        self._target = target
        self._options = options
        self._team = team
        self._stop = threading.Event()
        self._keeping = Keeping(prepared, self._records, options.workers, self._stop, self._cancel)

    def write(self, ranks: Sequence[int]) -> tuple[list[Shard], list[Shard]]:
        """Write these ranks' shards. Returns those that were written, and those of an earlier run that were kept."""
        kept = self._keeping.kept(ranks, self._team.tick) if self._options.resume else {}
        todo = [self._plan.shards[rank] for rank in ranks if rank not in kept]
        self._target.check_space(sum(self._team.exchange(sum(shard.size for shard in todo))))
        self._prepared.source.prefetch(wanted(self._prepared, todo))
        replacing = any(self._team.exchange(self._options.overwrite and self._target.contents().finished))
        if not self._target.stages:
            if replacing:
                self._take_manifest_away()
            # A shard takes its name before it has a record: none of another set may vouch for it.
            self._records.forget(todo)
        # Where files can wait unseen, a finished set stays whole until every new shard is durable.
        staged = replacing and self._target.stages
        written, waiting = interruptible(lambda: self._write(todo, staged), self._cancel)
        self._prepared.source.check_unchanged()
        if staged:
            self._team.exchange(None)
            self._take_manifest_away()
        return [*written, *(self._commit(sink, shard) for sink, shard in waiting)], list(kept.values())

    def _take_manifest_away(self) -> None:
        """The first process does it; then each where it sees one, in a folder of its own."""
        if self._team.place.leads:
            self._target.take_manifest_away()
        self._team.exchange(None)
        self._target.take_manifest_away()

    def _write(self, todo: Sequence[PlannedShard], staged: bool) -> tuple[list[Shard], list[tuple[Sink, Shard]]]:
        """Write shards with several threads; staged ones wait to be committed.

        What is not finished when one fails is removed.
        """
        waiting: list[tuple[Sink, Shard]] = []
        written: list[Shard] = []
        futures: list[Future[tuple[Sink, Shard]]] = []
        with ThreadPoolExecutor(self._options.workers, thread_name_prefix="reshard") as pool:
            try:
                futures += [pool.submit(self._write_shard, shard) for shard in todo]
                for future in as_completed(futures):
                    if staged:
                        waiting.append(future.result())
                    else:
                        written.append(self._commit(*future.result()))
            except BaseException:
                self._cancel()
                pool.shutdown(cancel_futures=True)
                raise_first(futures)
                raise
        return written, waiting

    def _cancel(self) -> None:
        self._stop.set()
        self._prepared.source.cancel()

    def _write_shard(self, planned: PlannedShard) -> tuple[Sink, Shard]:
        self._advance(0)  # not even begun when another worker has failed
        stream = ShardStream(self._target.create(planned.file, planned.size))
        try:
            stream.write(planned.header)
            digests = [stream.write_tensor(tensor, self._prepared.readers, self._advance) for tensor in planned.tensors]
            _, digest = stream.close()
            self._prepared.source.check_unchanged()
        except BaseException:
            stream.discard()
            self._stop.set()
            raise
        return stream.sink, planned.entry(digest, digests)

    def _advance(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        self._team.tick(nbytes)

    def _commit(self, sink: Sink, shard: Shard) -> Shard:
        self._records.put(shard, sink.commit())
        return shard

    def _others(self, done: Collection[int]) -> tuple[int, ...]:
        return tuple(rank for rank in range(self._plan.tp_size) if rank not in done)

    def complete(
        self, turn: Turn, written: Sequence[Sequence[Shard]], kept: Sequence[Sequence[Shard]]
    ) -> tuple[int, ...]:
        """Write the manifest if every rank's shard is there. Returns the ranks that are not.

        written, kept: by process. Raises OutputError where another process's shards are in a folder of its own.
        """
        of_processes = [[*new, *old] for new, old in zip(written, kept, strict=True)]
        done = {shard.tp_rank: shard for shards in of_processes for shard in shards}
        if not turn.finish():
            return self._others(done)
        shards = self._seen(done, of_processes)
        if len(shards) == self._plan.tp_size:
            shards = {**self._keeping.kept(self._others(done)), **done}
        missing = self._others(shards)
        if missing:
            return missing
        self._prepared.source.check_unchanged()
        if not turn.exclusive:
            self._require_unchanged()
        self._target.remove_temporaries(None)
        side_files = self._prepared.checkpoint.side_files
        for name, data in sorted(side_files.items()):
            self._target.put(name, data)
        ordered = [shards[rank] for rank in range(self._plan.tp_size)]
        self._target.put(MANIFEST, self._records.manifest(ordered).to_json())
        keep = {MANIFEST, *side_files, *(s.file for s in self._plan.shards)}
        self._target.remove(stale(self._target.files(), keep))
        return ()

    def _require_unchanged(self) -> None:
        """Raises OutputError where another run has replaced a shard since its record was put."""
        for record in self._records.found().values():
            if not self._target.holds(record):
                raise OutputError(
                    f"{self._target.address}/{record.shard.file}: is no longer what was written there: another run "
                    "writes to this place; wait until it has ended, then run the same command with --resume"
                )

    def _seen(self, done: Mapping[int, Shard], of_processes: Sequence[Sequence[Shard]]) -> dict[int, Shard]:
        """The recorded shards that are there now; another run may have replaced one of those that are done."""
        deadline = time.monotonic() + _APPEARING_SECONDS
        while True:
            shards = {
                r: record.shard
                for r, record in self._records.found().items()
                if done.get(r, record.shard) == record.shard
            }
            for process, made in enumerate(of_processes):
                unseen = [shard.file for shard in made if shard.tp_rank not in shards]
                if process and unseen:
                    break
            else:
                return shards
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{self._target.address}: {self._team.name(process)} has written {min(unseen)}, and "
                    f"{self._team.name(0)} does not see it there: each host has a folder of its own. Copy the "
                    "denseffn-rank-* files of all of them into one (.safetensors and .record.json), then run the same "
                    "command on that host alone with --resume"
                )
            time.sleep(0.5)
