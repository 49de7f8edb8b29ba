"""The split itself: shards by several threads, and processes, then the manifest.

Each worker takes a rank, or some that are written in step with those of others, and streams its file front to back. A
finished shard gets its name and a record; when every rank's is there, the manifest takes the records over and the set
is complete.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import OutputError, UsageError
from reshard.manifest import Shard
from reshard.model.naming import MANIFEST
from reshard.plan.pipeline import Prepared, wanted
from reshard.plan.plan import Plan, PlannedShard
from reshard.workers import Workers
from reshard.writer.file import DirectFile
from reshard.writer.neighbours import Group, grouped
from reshard.writer.open import open_target
from reshard.writer.records import Records, other_set
from reshard.writer.stream import ShardStream, write_tensors
from reshard.writer.target import Target, Tick, contents, record_file, stale, take_manifest_away
from reshard.writer.team import Place, Team, share

# More than this machine's cores: while some wait for the disk, others cut and hash.
DEFAULT_WORKERS = min(8, 4 * len(os.sched_getaffinity(0)))
_APPEARING_SECONDS = 10.0  # a shared folder may show late what another host has put there


@dataclass(frozen=True)
class SplitOptions:
    """How a split treats its output folder. `ranks`: those to write, None for all. Raises UsageError."""

    ranks: tuple[int, ...] | None = None
    resume: bool = False
    overwrite: bool = False
    workers: int = DEFAULT_WORKERS

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("--resume keeps what is there, --overwrite replaces it: give one of them")


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
    """Write a plan's shards to a folder or an address; `tick` is called with the bytes of each step.

    In a team each process writes its share of the ranks, and the first one's result is the whole team's. Raises
    OutputError before anything is written where the target does not allow it.
    """
    target = open_target(out) if isinstance(out, Path | str) else out
    return _Run(prepared, target, options, tick, team or Team()).run()


def check_target(prepared: Prepared, target: Target, options: SplitOptions, place: Place) -> None:
    """What `write_shards` finds in the target before it writes. Raises OutputError."""
    _check_contents(target, prepared.plan, own_ranks(prepared.plan, options, place), options)


def own_ranks(plan: Plan, options: SplitOptions, place: Place) -> tuple[int, ...]:
    """The ranks that a process writes."""
    return share(options.ranks if options.ranks is not None else tuple(range(plan.tp_size)), place)


class _Run:
    """One process's part of a split."""

    def __init__(self, prepared: Prepared, target: Target, options: SplitOptions, tick: Tick, team: Team) -> None:
        self._prepared = prepared
        self._plan = prepared.plan
        self._records = Records(prepared, target)
        self._target = target
        self._options = options
        self._tick = tick
        self._team = team
        self._workers = Workers(options.workers, prepared.source)

    def run(self) -> SplitResult:
        place = self._team.place
        ranks = own_ranks(self._plan, self._options, place)
        claimed = self._options.ranks if place.size == 1 else ranks
        _check_contents(self._target, self._plan, ranks, self._options)
        self._team.gather(None)  # nobody writes before all may
        with contextlib.ExitStack() as held:
            may_complete = held.enter_context(self._target.writing(claimed))
            # Again, now that no other run can change it.
            _check_contents(self._target, self._plan, ranks, self._options)
            self._target.remove_temporaries(claimed)
            kept = self._kept(ranks, self._tick) if self._options.resume else {}
            written = self._write([self._plan.shards[rank] for rank in ranks if rank not in kept])
            if not place.leads:
                held.close()
            results = self._team.gather((written, list(kept.values())))
            missing = self._complete(may_complete, [[*new, *old] for new, old in results]) if place.leads else ()
            (missing, *_) = self._team.gather(missing)
        return SplitResult(_by_rank(new for new, _ in results), _by_rank(old for _, old in results), missing)

    def _kept(self, ranks: Collection[int], tick: Tick) -> dict[int, Shard]:
        """The shards of these ranks that an earlier run has finished and this one would write again, byte for byte."""
        found = {rank: shard for rank, shard in self._records.found().items() if rank in ranks}
        source, kept = self._prepared.source, {}
        if found and source.origin.commit is None:
            source.prefetch(wanted(self._prepared, [self._plan.shards[rank] for rank in found]))

        def keep(compared: tuple[Shard, bool]) -> None:
            shard, same = compared
            if same:
                kept[shard.tp_rank] = shard
                tick(shard.size)

        self._workers.each(lambda s: (s, self._records.is_kept(s, self._workers.tick)), found.values(), keep)
        return kept

    def _write(self, todo: Sequence[PlannedShard]) -> list[Shard]:
        """Write shards. A finished set that they replace stays whole until the new shards of all are durable."""
        replacing = self._options.overwrite and contents(self._target).finished
        asked = self._team.gather((sum(shard.size for shard in todo), replacing))
        names = (*self._prepared.checkpoint.side_files, *(record_file(shard.file) for shard in todo))
        self._target.check_room(names, sum(size for size, _ in asked))
        self._prepared.source.prefetch(wanted(self._prepared, todo))
        waiting: list[tuple[DirectFile, Shard]] = []
        written: list[Shard] = []

        def publish(made: tuple[DirectFile, Shard]) -> None:
            file, shard = made
            self._records.check_repair(shard)
            self._target.publish(file, shard, self._workers.tick)
            self._records.put(shard)
            written.append(shard)

        staged = any(replacing for _, replacing in asked)

        def keep(group: Sequence[tuple[DirectFile, Shard]]) -> None:
            for made in group:
                publish(made)

        groups = grouped(todo, self._options.workers, self._prepared.readers, self._workers.tick)
        self._workers.each(self._write_group, groups, waiting.extend if staged else keep)
        self._prepared.source.check_unchanged()
        if staged:
            # The first process takes the manifest away; then each that still sees one, in a folder of its own.
            for mine in (self._team.place.leads, True):
                self._team.gather(None)
                if mine:
                    take_manifest_away(self._target)
        for made in waiting:
            publish(made)
        return written

    def _write_group(self, group: Group) -> list[tuple[DirectFile, Shard]]:
        self._advance(0)  # not even begun when another worker has failed
        shards, files, digests = group.shards, [], []
        with contextlib.ExitStack() as unfinished:
            for planned in shards:
                files.append(self._target.create(planned.file))
                unfinished.callback(files[-1].discard)
            streams = [ShardStream(file, group.stage_bytes) for file in files]
            for stream, planned in zip(streams, shards, strict=True):
                stream.write(planned.header)
            for number, tensors in enumerate(zip(*(planned.tensors for planned in shards), strict=True)):
                with group.reading(number, self._prepared.readers) as (readers, rows):
                    digests.append(write_tensors(streams, tensors, readers, self._advance, rows))
            wholes = [digest for _, digest in (stream.close() for stream in streams)]
            self._prepared.source.check_unchanged()
            unfinished.pop_all()
        made = zip(files, shards, wholes, zip(*digests, strict=True), strict=True)
        return [(file, planned.entry(whole, of_tensors)) for file, planned, whole, of_tensors in made]

    def _advance(self, nbytes: int) -> None:
        self._workers.tick(nbytes)
        self._tick(nbytes)

    def _complete(self, may_complete: Callable[[], bool], of_processes: Sequence[Sequence[Shard]]) -> tuple[int, ...]:
        """Write the manifest if every rank's shard is there. Returns the ranks that are not.

        of_processes: what each has written or kept. Raises OutputError where another process's shards are in a folder
        of its own.
        """
        done = {shard.tp_rank: shard for shards in of_processes for shard in shards}
        others = tuple(rank for rank in range(self._plan.tp_size) if rank not in done)
        if not may_complete():
            return others
        shards = self._seen(done, of_processes)
        if len(shards) == self._plan.tp_size:
            shards = {**self._kept(others, lambda nbytes: None), **done}
        missing = tuple(rank for rank in range(self._plan.tp_size) if rank not in shards)
        if missing:
            return missing
        self._prepared.source.check_unchanged()
        self._target.remove_temporaries(None)
        side_files = self._prepared.checkpoint.side_files
        for name, data in sorted(side_files.items()):
            self._target.put(name, data)
        ordered = [shards[rank] for rank in range(self._plan.tp_size)]
        self._target.put(MANIFEST, self._records.manifest(ordered).to_json())
        keep = {MANIFEST, *side_files, *(s.file for s in self._plan.shards)}
        self._target.remove(stale(self._target.files(), keep))
        return ()

    def _seen(self, done: Mapping[int, Shard], of_processes: Sequence[Sequence[Shard]]) -> dict[int, Shard]:
        """The recorded shards that are there now; another run may have replaced one of those that are done."""
        deadline = time.monotonic() + _APPEARING_SECONDS
        while True:
            found = self._records.found().items()
            shards = {rank: shard for rank, shard in found if done.get(rank, shard) == shard}
            unseen = [
                (process, shard.file)
                for process, made in enumerate(of_processes)
                for shard in made
                if process and shard.tp_rank not in shards
            ]
            if not unseen:
                return shards
            if time.monotonic() > deadline:
                process, file = min(unseen)
                raise OutputError(
                    f"{self._target.address}: {self._team.names[process]} has written {file}, and "
                    f"{self._team.names[0]} does not see it there: each host has a folder of its own. Copy the "
                    f"{self._plan.part}-rank-* files of all of them into one (.safetensors and .record.json), then run "
                    "the same command on that host alone with --resume"
                )
            time.sleep(0.5)


def _by_rank(of_processes: Iterable[Sequence[Shard]]) -> tuple[Shard, ...]:
    return tuple(sorted((s for shards in of_processes for s in shards), key=lambda shard: shard.tp_rank))


def _check_contents(target: Target, plan: Plan, ranks: Collection[int], options: SplitOptions) -> None:
    there = contents(target)
    if there.foreign:
        raise OutputError(
            f"{target.address}: holds {there.foreign[0]}, which is no part of a shard set; choose an empty folder"
        )
    if options.overwrite:
        if there.finished and options.ranks is not None:
            raise OutputError(
                f"{target.address}: holds a finished set, which --overwrite replaces as a whole; leave --ranks out, or "
                "choose another folder"
            )
        return
    if there.finished and not options.resume:
        raise OutputError(f"{target.address}: holds a finished shard set; choose another folder, or --overwrite it")
    other = sorted(shard for shard in there.shards if (shard.part, shard.tp_size) != (plan.part, plan.tp_size))
    # Of a set that this one replaced: an overwrite was cut off, and is gone on with.
    if other and not (options.resume and (there.replaced or there.finished)):
        raise other_set(target, other[0].part, other[0].tp_size, plan)
    done = sorted(shard.tp_rank for shard in there.shards if shard.tp_rank in ranks)
    if done and not options.resume:
        raise OutputError(
            f"{target.address}: holds rank {done[0]}'s shard of an unfinished set; go on with --resume, or start anew "
            "with --overwrite"
        )
