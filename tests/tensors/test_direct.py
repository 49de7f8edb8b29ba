"""What is read once goes past the page cache, byte for byte; what the cache has comes out of it."""

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reshard.errors import SourceError
from reshard.regular import Opened
from reshard.tensors import direct
from reshard.tensors.direct import BLOCK
from reshard.tensors.memory import Bytes, aligned
from reshard.tensors.rows import RowReader
from tests.support.page_cache import Reads, drop, require_direct_reads

REGION = 1 << 20
SIZE = 3 * REGION + 1234
DATA = np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of DATA, on the disk and not in the page cache."""
    monkeypatch.setattr(direct, "_REGION", REGION)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    drop(path)
    require_direct_reads(path)
    return path


def read(path: Path, start: int, size: int, at: int = 0) -> bytes:
    """Once, into memory that begins `at` bytes behind a page's start."""
    out = aligned(size + at)[at:].reshape(1, size)
    with Opened(path) as opened:
        RowReader(opened, "file").read(out, start, size, once=True)
    return out.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(start=st.integers(0, SIZE - 1), size=st.integers(1, SIZE), at=st.integers(0, BLOCK - 1))
@example(start=0, size=SIZE, at=0)
@example(start=8, size=SIZE - 8, at=8)  # as far behind a block's start in the file as in memory
@example(start=BLOCK + 8, size=2 * REGION, at=8)
@example(start=8, size=2 * REGION, at=0)
@example(start=SIZE - 200_000, size=200_000, at=0)  # up to the end, which is no block's
def test_the_very_bytes(file: Path, reads: Reads, start: int, size: int, at: int) -> None:
    drop(file)
    reads.past = reads.through = 0
    size = min(size, SIZE - start)
    assert read(file, start, size, at) == DATA[start : start + size]
    if size >= 1 << 17:
        assert reads.through == 0
        assert size <= reads.past <= size + 8 * BLOCK  # a block at each end of each piece of a MiB
    else:
        assert (reads.past, reads.through) == (0, size)


def test_what_the_cache_has_is_not_read_from_the_disk(file: Path, reads: Reads) -> None:
    file.read_bytes()
    assert read(file, 100, REGION) == DATA[100 : 100 + REGION]
    assert (reads.past, reads.through) == (0, REGION)


def test_a_region_of_which_the_cache_has_little(file: Path, reads: Reads) -> None:
    """As the kernel leaves it that has read ahead."""
    with Opened(file) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # it reads nothing ahead
        opened.read(0, REGION // 2 - BLOCK)
        opened.read(REGION, REGION + REGION // 2 + BLOCK)
    assert read(file, 0, 1 << 17) == DATA[: 1 << 17]
    assert reads.through == 0
    assert read(file, REGION, 1 << 17) == DATA[REGION : REGION + (1 << 17)]
    assert reads.through == 1 << 17


def test_a_look_at_a_few_rows_does_not_fill_the_cache(file: Path, reads: Reads) -> None:
    """As a checkpoint is sampled before it is cut: the kernel reads megabytes around what is read of a map."""
    out = np.empty((2, 512), np.uint8)
    with Opened(file) as opened:
        reader = RowReader(opened, "file")
        for start in (0, REGION // 2, REGION - 8192):
            reader.read(out, start, 4096)
            assert out.tobytes() == DATA[start : start + 512] + DATA[start + 4096 : start + 4608]
        reads.through = 0
        reader.read(np.empty((1, REGION), np.uint8), 0, REGION, once=True)
    assert reads.through == 0


@pytest.mark.parametrize("once", [True, False])
def test_a_file_that_was_cut_short(file: Path, once: bool) -> None:
    out = np.empty((1, SIZE), np.uint8)
    with Opened(file) as opened:
        reader = RowReader(opened, "file")
        os.truncate(file, 2 * REGION + 5)
        with pytest.raises(SourceError, match=f"ends at byte {2 * REGION + 5}, expected {SIZE}"):
            reader.read(out, 0, SIZE, once)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_reads(file: Path, reads: Reads, error: int) -> None:
    reads.refuse = error
    assert read(file, 5, 2 * REGION) == DATA[5 : 5 + 2 * REGION]
    assert (reads.past, reads.through) == (0, 2 * REGION)


def test_a_file_system_that_knows_none(file: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def without(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opening(path, flags)

    monkeypatch.setattr(os, "open", without)
    assert read(file, 5, 2 * REGION) == DATA[5 : 5 + 2 * REGION]
    assert (reads.past, reads.through) == (0, 2 * REGION)


def test_the_last_descriptors_are_for_other_files(file: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint of many files, all of which are open, not each can have a second one."""
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8, 8))
    assert read(file, 5, 2 * REGION) == DATA[5 : 5 + 2 * REGION]
    assert (reads.past, reads.through) == (0, 2 * REGION)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails(file: Path, reads: Reads) -> None:
    """The read through the cache says so."""
    reads.refuse = reads.fail = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        read(file, 0, REGION)


def test_rows_that_lie_apart(file: Path, reads: Reads) -> None:
    """They are copied out of the cache, in one call."""
    out: Bytes = np.empty((128, 2048), np.uint8)
    with Opened(file) as opened:
        RowReader(opened, "file").read(out, 7, 8192, once=True)
    assert out.tobytes() == b"".join(DATA[7 + row * 8192 :][:2048] for row in range(128))
    assert reads.past == 0
