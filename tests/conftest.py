"""Fixtures that most tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.builders import CHECKPOINTS, REAL
from tests.support.distributed import Ranks, kept
from tests.support.marks import set_marks
from tests.support.page_cache import Reads
from tests.support.s3 import Server


@pytest.fixture(params=REAL)
def real_checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each of the checkpoints that real tools wrote."""
    return CHECKPOINTS / str(request.param)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Groups of processes by size, started when they are first used and kept."""
    yield from kept()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Server]:
    """A real one, with an empty bucket."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3_server_here(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same, which this process's clients use, too."""
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[object, frozenset[str]] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            set_marks(item, seen)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What is read past the page cache, and through it."""
    found = Reads()
    monkeypatch.setattr(os, "preadv", found.preadv)
    return found
