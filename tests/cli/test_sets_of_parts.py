"""A folder of sets, one for each part: what was to be a set and is none is told."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.running import reshard, split

DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to(path.parent / "gone"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["verify", "merge", "check"])
def test_a_part_that_is_no_set(command: str, damage: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    sets = tmp_path / "sets"
    split(tmp_path / "model", sets / "denseffn", Cut(2))
    DAMAGE[damage](sets / "lm_head")
    done = reshard(command, sets, *([tmp_path / "merged"] if command == "merge" else []))
    assert done.code == 1
    assert "lm_head" in done.err
    assert not (tmp_path / "merged").exists()
