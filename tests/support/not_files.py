"""What may stand in a file's place."""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECONDS = 60

KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}
"""What messages call it, and how it is made."""


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """What waits for a FIFO's other end fails."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"nothing came within {SECONDS} s: is a FIFO waited for?")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
