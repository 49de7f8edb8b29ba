"""Work with threads that stop together: at the first error, and at a Ctrl-C, which leaves none waiting for another."""

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

A = TypeVar("A")
B = TypeVar("B")

# How long a thread waits before it looks whether it is to end. A signal that arrives just before the main thread begins
# to wait is not seen until the wait ends.
LOOK_SECONDS = 0.2


class Cancelled(Exception):
    """A call was told to end; what it was to bring is no longer wanted."""


class Awaited(Protocol):
    """What a thread may wait for."""

    def cancel(self) -> None:
        """Make calls that wait, in whatever thread, raise Cancelled soon."""


class Workers:
    """So many threads, which read `sources`."""

    def __init__(self, number: int, *sources: Awaited) -> None:
        self._number = number
        self._sources = sources
        self._stop = threading.Event()

    def each(self, work: Callable[[A], B], items: Iterable[A], done: Callable[[B], None]) -> None:
        """Call `work` on each item, and `done`, in one thread, with what it gives. Raises the first error."""
        interruptible(lambda: self._each(work, items, done), self._cancel)

    def map(self, work: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """What `work` gives of each item, in their order. Raises as `each`."""
        found: list[tuple[int, B]] = []
        self.each(lambda numbered: (numbered[0], work(numbered[1])), enumerate(items), found.append)
        return [result for _, result in sorted(found, key=lambda numbered: numbered[0])]

    def tick(self, nbytes: int) -> None:
        """To be called at each step of the work. Raises Cancelled when it is to end."""
        if self._stop.is_set():
            raise Cancelled

    def _each(self, work: Callable[[A], B], items: Iterable[A], done: Callable[[B], None]) -> None:
        futures: list[Future[B]] = []
        dealt = threading.Event()

        def begin(item: A) -> B:
            # What ends while others are dealt out may leave the pool a thread short; some work waits for all threads'.
            dealt.wait()
            return work(item)

        with ThreadPoolExecutor(self._number, thread_name_prefix="reshard") as pool:
            try:
                for item in items:
                    self.tick(0)
                    futures.append(pool.submit(begin, item))
                dealt.set()
                for future in as_completed(futures):
                    done(future.result())
            except BaseException:
                self._cancel()
                dealt.set()
                pool.shutdown(cancel_futures=True)
                _raise_first(futures)
                raise

    def _cancel(self) -> None:
        self._stop.set()
        for source in self._sources:
            source.cancel()


def _raise_first(futures: Iterable[Future[B]]) -> None:
    """Raise what stopped the first of several workers, not how the others took it."""
    for future in futures:
        if not future.cancelled() and not isinstance(future.exception(), Cancelled | None):
            future.result()


def interruptible(call: Callable[[], A], stop: Callable[[], None]) -> A:
    """Call it in a thread of its own. An interruption calls `stop`, waits for the call's end, and is raised then.

    Python raises what a signal's handler raises in the main thread, between any two of its steps: also within the code
    of a Condition, which then stays locked for ever. So the main thread shares none with the pool's workers.
    """
    wake: SimpleQueue[None] = SimpleQueue()  # in C: it is never left half done
    begun: list[bool] = []
    results: list[A] = []
    errors: list[BaseException] = []

    def run() -> None:
        begun.append(True)
        try:
            results.append(call())
        except BaseException as error:  # raised again below
            errors.append(error)
        wake.put(None)

    def wait() -> None:
        while not results and not errors:
            with contextlib.suppress(Empty):
                wake.get(timeout=LOOK_SECONDS)

    try:
        threading.Thread(target=run, name="reshard-work", daemon=True).start()
        wait()
    except BaseException:
        stop()
        if begun:
            wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
