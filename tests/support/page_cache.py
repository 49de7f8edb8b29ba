"""What is read past the page cache, and through it."""

import fcntl
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

READ = os.preadv


@dataclass
class Reads:
    """Bytes that were read past the page cache, and through it. refuse, fail: what a direct, another read ends with."""

    past: int = 0
    through: int = 0
    refuse: int = 0
    fail: int = 0

    def preadv(self, descriptor: int, buffers: Sequence[Any], at: int) -> int:
        is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if error := self.refuse if is_direct else self.fail:
            raise OSError(error, os.strerror(error))
        size = READ(descriptor, buffers, at)
        if is_direct:
            self.past += size
        else:
            self.through += size
        return size


def drop(path: Path) -> None:
    """Out of the page cache; what is not on the disk yet goes there first."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def require_direct_reads(path: Path) -> None:
    """Skips the test where a file's file system has none, or no disk."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{path} is on a file system without direct reads")
    if subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout.strip() == "tmpfs":
        pytest.skip(f"{path} is in memory")
