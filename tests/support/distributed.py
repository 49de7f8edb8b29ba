"""Groups of real processes with gloo, kept for many tests: a failing rank fails the test, a hang is a time-out.

`Ranks(4).run(function, *args)` calls `function(group, *args)` in each process and returns the results by rank. The
function must be importable (a module's own), arguments and results picklable.
"""

import contextlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import forks

TIMEOUT_SECONDS = 120
_AFTER_A_FAILURE_SECONDS = 5


class RankFailure(AssertionError):
    """What a rank raised: its type's name and message are in `kinds` and in the text, with the traceback."""

    def __init__(self, failures: dict[int, tuple[str, str]]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, (_, text) in sorted(failures.items())))
        self.kinds = {rank: kind for rank, (kind, _) in failures.items()}


class Ranks:
    """`size` processes in one gloo group. `prepare` is what each does first, `timeout` what `run` waits for them."""

    def __init__(
        self, size: int, *, prepare: Callable[[], object] | None = None, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        self.size, self._prepare, self._timeout = size, prepare, timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Results by rank. Raises RankFailure, or TimeoutError that names the ranks without an answer."""
        timeout = self._timeout if timeout is None else timeout
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, tuple[str, str]] = {}
        end = time.monotonic() + timeout
        waiting = dict(enumerate(self._pipes))
        while waiting and (left := end - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), left)
            for rank, pipe in [(rank, pipe) for rank, pipe in waiting.items() if pipe in ready]:
                del waiting[rank]
                try:
                    failure, value = pipe.recv()
                except EOFError:
                    failure, value = "EOFError", "the process died"
                if failure is None:
                    results[rank] = value
                else:
                    failures[rank] = (failure, value)
                    end = min(end, time.monotonic() + _AFTER_A_FAILURE_SECONDS)
        if waiting or failures:
            self.stop()
        if failures:
            raise RankFailure(failures)
        if waiting:
            raise TimeoutError(f"{function.__qualname__}: no answer of ranks {sorted(waiting)} within {timeout} s")
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = forks.context()
        meeting = Path(tempfile.mkdtemp()) / "ranks"
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, str(meeting), there, self._prepare)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)


def kept(**options: Any) -> Iterator[Callable[[int], Ranks]]:
    """Groups by size, started when they are first used, and stopped in the end. options: of `Ranks`."""
    started: dict[int, Ranks] = {}
    yield lambda size: started.setdefault(size, Ranks(size, **options))
    for group in started.values():
        group.stop()


def _serve(rank: int, size: int, meeting: str, pipe: Connection, prepare: Callable[[], object] | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                if prepare is not None:
                    first, prepare = prepare, None
                    first()
                pipe.send((None, function(dist.group.WORLD, *args)))
            except Exception as error:
                pipe.send((type(error).__name__, "".join(traceback.format_exception(error))))
