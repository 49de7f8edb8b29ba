"""reshard_runtime.measure with next to nothing to do, or with a process that fails: runs in processes of its own."""

import os
import signal
from typing import Any

from reshard_runtime import measure
from reshard_runtime.processes import program

measure._ROUNDS = measure._CALLS = measure._EXCHANGES = 3
measure._ROWS, measure._COLUMNS, measure._STREAM_ELEMENTS = 256, 512, 1 << 18


def fail(group: Any) -> dict[str, float]:
    """The last one fails, the other waits for ever."""
    if group.rank() == 0:
        signal.pause()
    raise OSError(6, "no such device")


if "MEASURE_FAILS" in os.environ:
    measure.measure = fail
if __name__ == "__main__":
    program(measure.main)
