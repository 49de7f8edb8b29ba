"""Daemon threads whose results nobody has to wait for.

A client that waits for a silent server cannot be stopped, whichever library it is of. So it is left behind: its future
is cancelled, and its thread ends when the server answers or the process does.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from reshard.workers import Cancelled

_T = TypeVar("_T")


class Fetchers:
    """`count` threads that take jobs in their order, and one more for each that is waited for at once."""

    def __init__(self, count: int) -> None:
        self._idle = count  # threads that may still be started
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._cancelled = False

    def now(self, call: Callable[[], _T]) -> _T:
        """Call it in a thread of its own, and wait."""
        future = self._future()
        _start_daemon(lambda: self._run(future, call))
        result: _T = result_of(future)
        return result

    def soon(self, call: Callable[[], _T]) -> Future[_T]:
        """Call it when one of `count` threads is free."""
        future = self._future()
        self._jobs.put((future, call))
        if self._idle:
            self._idle -= 1
            _start_daemon(self._work)
        return future

    def cancel(self) -> None:
        """Whoever waits, or would, gets Cancelled."""
        with self._lock:
            self._cancelled = True
            waiting = tuple(self._open)
        for future in waiting:
            future.cancel()
        self._jobs.put(None)

    def _future(self) -> Future[Any]:
        """Never marked as running, so that it can be cancelled until it has a result."""
        future: Future[Any] = Future()
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._open.add(future)
        return future

    def _work(self) -> None:
        while job := self._jobs.get():
            self._run(*job)
        self._jobs.put(None)  # for the next one

    def _run(self, future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            settle = partial(future.set_result, call())
        except BaseException as error:  # raised where the result is asked for
            settle = partial(future.set_exception, error)
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            settle()
        with self._lock:
            self._open.discard(future)


def _start_daemon(target: Callable[[], None]) -> None:
    threading.Thread(target=target, name="reshard-fetch", daemon=True).start()


def result_of(future: Future[_T]) -> _T:
    """Wait for it. Raises Cancelled."""
    try:
        return future.result()
    except CancelledError:
        raise Cancelled from None
