"""Programs that end, in each order of shutting down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support import ends
from tests.support.builders import Spec, build
from tests.support.paths import ROOT
from tests.support.running import split

PAIRS = 5
"""Of ten processes that hold the group strongly, six or seven abort."""
TIMEOUT_SECONDS = 300


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    build(folder / "model", Spec("bf16", ends.HIDDEN, ends.INTERMEDIATE, computable=True))
    split(folder / "model", folder / "tp2", Cut(2))
    return folder / "tp2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "programs"), [(PAIRS, ends.PROGRAMS), (2, ends.COMMANDS)], ids=["layers", "commands"]
)
def test_no_order_of_shutting_down_aborts(
    shards: Path, tmp_path: Path, pairs: int, programs: dict[str, object]
) -> None:
    command = [sys.executable, "-m", "tests.support.ends", str(shards), str(tmp_path), str(pairs), *programs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [0] * 2 * pairs for name in programs}, done.stderr
