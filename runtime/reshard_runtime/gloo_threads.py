"""Tensors that gloo's worker threads may still hold when the program ends.

A worker lets go of a collective's tensors only after it has told the caller that it is done, and needs Python's lock
for it. Once the interpreter has begun to end, asking for that lock ends the thread, and the process aborts ("terminate
called without an active exception"). Where a group is destroyed that nobody holds any more, its threads are awaited;
else nothing of torch awaits them.
"""

import atexit
import time
import weakref

import torch

_SECONDS = 10.0
_PAUSE_SECONDS = 0.001
_held: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


def let_go_before_exit(*tensors: torch.Tensor) -> None:
    """Have the program's end wait until nobody holds the tensors, which must be the collective's own."""
    _held.update((id(tensor), tensor) for tensor in tensors)


@atexit.register
def _wait() -> None:
    end = time.monotonic() + _SECONDS
    while _held and time.monotonic() < end:
        time.sleep(_PAUSE_SECONDS)  # without Python's lock
