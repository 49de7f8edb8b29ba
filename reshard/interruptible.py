"""Work with threads that a Ctrl-C does not leave waiting for each other."""

import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

# A signal that arrives just before the main thread begins to wait is not seen until the wait ends.
_LOOK_SECONDS = 0.2


def interruptible(call: Callable[[], T], stop: Callable[[], None]) -> T:
    """Call it in a thread of its own. An interruption calls `stop`, waits for the call's end, and is raised then.

    Python raises what a signal's handler raises in the main thread, between any two of its steps: also within the code
    of a Condition, which then stays locked for ever. So the main thread shares none with the pool's workers.
    """
    wake: SimpleQueue[None] = SimpleQueue()  # in C: it is never left half done
    begun: list[bool] = []
    results: list[T] = []
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
                wake.get(timeout=_LOOK_SECONDS)

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
