"""What a source elsewhere must offer, and how faults that may pass are borne."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from reshard.errors import SourceError
from reshard.source.base import Cancelled, Origin

Notify = Callable[[str], None]

MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})  # HTTP statuses after which it is worth asking again


class Fault(Exception):
    """What may pass: a connection that broke, a server that is busy. `retry_after`: the seconds that it asks for."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Remote(Protocol):
    """Files elsewhere. Safe to use from several threads."""

    @property
    def origin(self) -> Origin:
        """Where this is, for the manifest."""

    def sizes(self) -> Mapping[str, int]:
        """Every file's name and size in bytes. Raises Fault or SourceError."""

    def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) in order, in pieces of any size. May end early.

        Raises Fault for what may pass, SourceError for what does not.
        """

    def cancel(self) -> None:
        """Make calls of `fetch` that wait for a server end soon, in whatever way."""

    def close(self) -> None:
        """Release what is held."""


@dataclass(frozen=True)
class Patience:
    """How faults are borne. After `tries` in a row that brought nothing it is over.

    The seconds between them double from `first` to `longest`, and are more where a server asks for more, up to
    `bearable`.
    sleep: for tests; the real one ends early when the source is cancelled.
    """

    tries: int = 6
    first: float = 1.0
    longest: float = 30.0
    bearable: float = 600.0
    sleep: Callable[[float], None] | None = None


class Pauses:
    """The waiting between tries, for all threads of a source."""

    def __init__(self, patience: Patience, notify: Notify) -> None:
        self._patience = patience
        self._notify = notify
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._silent_until = 0.0

    def stop(self) -> None:
        """End all waiting, now and later."""
        self._stopped.set()

    def check(self) -> None:
        """Raises Cancelled after `stop`."""
        if self._stopped.is_set():
            raise Cancelled

    def after(self, fault: Fault, failures: int, what: str) -> None:
        """Wait after the n-th failure in a row. Raises SourceError where that was the last one."""
        patience = self._patience
        self.check()
        if failures >= patience.tries:
            raise SourceError(f"{what}: {fault}; given up after {failures} tries: try again later")
        asked = fault.retry_after
        if asked is not None and asked > patience.bearable:
            raise SourceError(f"{what}: {fault}; the server asks for {asked:.0f} s of patience: try again then")
        # Not less than its own: a date that a server gives lies in the past where this clock is fast.
        delay = max(asked or 0.0, min(patience.longest, patience.first * 2 ** (failures - 1)))
        self._say(f"{what}: {fault}; again in {delay:g} s", delay)
        if patience.sleep is not None:
            patience.sleep(delay)
        else:
            self._stopped.wait(delay)
        self.check()

    def _say(self, line: str, delay: float) -> None:
        """One line for all threads that wait for the same thing."""
        with self._lock:
            now = time.monotonic()
            if now < self._silent_until:
                return
            self._silent_until = now + delay
        self._notify(line)
