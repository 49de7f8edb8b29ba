"""Which shards of earlier runs stay: those that are what this run would write."""

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed

from reshard.interruptible import interruptible, raise_first
from reshard.manifest import Record, Shard
from reshard.plan.pipeline import Prepared, wanted
from reshard.source.base import Cancelled
from reshard.writer.records import Records
from reshard.writer.team import Tick


class Keeping:
    """Compares recorded shards with the source, several at once. `cancel` sets `stop`, which ends it."""

    def __init__(
        self, prepared: Prepared, records: Records, workers: int, stop: threading.Event, cancel: Callable[[], None]
    ) -> None:
        self._prepared = prepared
        self._records = records
        self._workers = workers
        self._stop = stop
        self._cancel = cancel

    def kept(self, ranks: Collection[int], tick: Tick = lambda n: None) -> dict[int, Shard]:
        """The shards of these ranks that are there and stay. tick: called with the bytes of each."""
        found = {rank: record for rank, record in self._records.found().items() if rank in ranks}
        source, plan = self._prepared.source, self._prepared.plan
        if found and source.origin.commit is None:
            source.prefetch(wanted(self._prepared, [plan.shards[rank] for rank in found]))
        return interruptible(lambda: self._compare(found.values(), tick), self._cancel)

    def _compare(self, found: Collection[Record], tick: Tick) -> dict[int, Shard]:
        kept = {}
        with ThreadPoolExecutor(self._workers, thread_name_prefix="reshard") as pool:
            futures = {pool.submit(self._records.is_kept, record, self._step): record.shard for record in found}
            try:
                for future in as_completed(futures):
                    if future.result():
                        shard = futures[future]
                        kept[shard.tp_rank] = shard
                        tick(shard.size)
            except BaseException:
                self._cancel()
                pool.shutdown(cancel_futures=True)
                raise_first(futures)
                raise
        return kept

    def _step(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise Cancelled
