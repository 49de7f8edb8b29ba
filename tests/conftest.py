"""Fixtures that most tests share."""

from pathlib import Path

import pytest

from tests.builders import CHECKPOINTS

REAL = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


@pytest.fixture(params=REAL)
def real_checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each of the checkpoints that real tools wrote."""
    return CHECKPOINTS / request.param
