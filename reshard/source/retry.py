"""How faults that may pass are borne: a busy server, a connection that broke."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from reshard import limits
from reshard.errors import SourceError
from reshard.workers import Cancelled

Notify = Callable[[str], None]

MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})  # HTTP statuses after which it is worth asking again


class Fault(Exception):
    """What may pass. retry_after: the seconds that the server asks for. tries: fewer than the policy's, if not None."""

    def __init__(self, message: str, retry_after: float | None = None, tries: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.tries = tries


@dataclass(frozen=True)
class RetryPolicy:
    """After `tries` in a row that brought nothing it is over.

    The seconds between them double from `first` to `longest`, and are more where a server asks for more, up to
    `bearable`. sleep: for tests; the real one ends early when the source is cancelled.
    """

    tries: int = 6
    first: float = 1.0
    longest: float = 30.0
    bearable: float = limits.WAIT_SECONDS
    sleep: Callable[[float], None] | None = None

    def delay(self, fault: Fault, failures: int) -> float:
        """Seconds to wait after the n-th failure in a row.

        A server's wish only makes it longer: a date that it gives lies in the past where this host's clock is fast.
        """
        return max(fault.retry_after or 0.0, min(self.longest, self.first * 2.0 ** (failures - 1)))


class Backoff:
    """The waiting between tries, for all threads of a source."""

    def __init__(self, policy: RetryPolicy, notify: Notify) -> None:
        self._policy = policy
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
        self.check()
        policy, asked = self._policy, fault.retry_after
        if failures >= min(policy.tries, fault.tries or policy.tries):
            raise SourceError(f"{what}: {fault}; given up after {failures} tries: try again later")
        if asked is not None and asked > policy.bearable:
            raise SourceError(f"{what}: {fault}; the server asks to wait {asked:.0f} s: try again then")
        delay = policy.delay(fault, failures)
        self._say(f"{what}: {fault}; again in {delay:g} s", delay)
        sleep = policy.sleep if policy.sleep is not None else self._stopped.wait
        sleep(delay)
        self.check()

    def _say(self, line: str, delay: float) -> None:
        """One line for all threads that wait for the same thing."""
        with self._lock:
            now = time.monotonic()
            if now < self._silent_until:
                return
            self._silent_until = now + delay
        self._notify(line)
