"""What a server sends, as long as it comes fast enough.

A client that waits for a silent server cannot be stopped, whichever library it is of, and none of them notices one that
sends a byte now and then. So it is called in a thread of its own, and left behind: its thread ends when the server
answers, or the process does.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from queue import Empty, Queue
from typing import TypeVar

from reshard import limits
from reshard.source.retry import Fault
from reshard.workers import LOOK_SECONDS

_AHEAD = 16  # pieces that are held

_P = TypeVar("_P", bound=Sized)
_T = TypeVar("_T")


def watched(pieces: Callable[[], Iterable[_P]], seconds: float, ask: Callable[[], None] = lambda: None) -> Iterator[_P]:
    """The pieces. ask: called again and again while nothing comes; what it raises ends the waiting.

    Raises what they raise, and Fault where `seconds` bring less than limits.PROGRESS_BYTES.
    """
    queue: Queue[_P | BaseException | None] = Queue(_AHEAD)
    left = threading.Event()

    def run() -> None:
        try:
            for piece in pieces():
                queue.put(piece)
                if left.is_set():
                    return
            queue.put(None)
        except BaseException as error:  # raised where the pieces are taken
            queue.put(error)

    threading.Thread(target=run, name="reshard-watched", daemon=True).start()
    until, got = time.monotonic() + seconds, 0
    try:
        while True:
            try:
                piece = queue.get(timeout=max(0.0, min(LOOK_SECONDS, until - time.monotonic())))
            except Empty:
                ask()
                if time.monotonic() < until:
                    continue
                raise Fault(f"{got} bytes in {seconds:g} s: too slow", tries=limits.WRONG_TRIES) from None
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            got += len(piece)
            if got >= limits.PROGRESS_BYTES:
                until, got = time.monotonic() + seconds, 0
    finally:
        left.set()
        while not queue.empty():  # or it would wait for room
            queue.get()


def within(seconds: float, call: Callable[[], _T], ask: Callable[[], None] = lambda: None) -> _T:
    """What a call gives. ask: as above. Raises Fault where it takes longer."""
    ((result,),) = watched(lambda: [(call(),)], seconds, ask)
    return result
