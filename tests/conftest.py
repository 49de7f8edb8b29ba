"""Fixtures that most tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.builders import CHECKPOINTS, REAL
from tests.support.distributed import Ranks, kept
from tests.support.marks import set_marks


@pytest.fixture(params=REAL)
def real_checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each of the checkpoints that real tools wrote."""
    return CHECKPOINTS / str(request.param)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Groups of processes by size, started when they are first used and kept."""
    yield from kept()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[object, frozenset[str]] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            set_marks(item, seen)
