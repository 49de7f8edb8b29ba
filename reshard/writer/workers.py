"""Threads that stop together: at the first error, and at a Ctrl-C."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from reshard.interruptible import interruptible
from reshard.source.base import Cancelled, Source

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """So many threads that read a source."""

    def __init__(self, number: int, source: Source) -> None:
        self._number = number
        self._source = source
        self._stop = threading.Event()

    def each(self, work: Callable[[A], B], items: Iterable[A], done: Callable[[B], None]) -> None:
        """Call `work` on each item, and `done`, in one thread, with what it gives. Raises the first error."""
        interruptible(lambda: self._each(work, items, done), self._cancel)

    def tick(self, nbytes: int) -> None:
        """To be called at each step of the work. Raises Cancelled when it is to end."""
        if self._stop.is_set():
            raise Cancelled

    def _each(self, work: Callable[[A], B], items: Iterable[A], done: Callable[[B], None]) -> None:
        futures: list[Future[B]] = []
        with ThreadPoolExecutor(self._number, thread_name_prefix="reshard") as pool:
            try:
                futures += [pool.submit(work, item) for item in items]
                for future in as_completed(futures):
                    done(future.result())
            except BaseException:
                self._cancel()
                pool.shutdown(cancel_futures=True)
                _raise_first(futures)
                raise

    def _cancel(self) -> None:
        self._stop.set()
        self._source.cancel()


def _raise_first(futures: Iterable[Future[B]]) -> None:
    """Raise what stopped the first of several workers, not how the others took it."""
    for future in futures:
        if not future.cancelled() and not isinstance(future.exception(), Cancelled | None):
            future.result()
