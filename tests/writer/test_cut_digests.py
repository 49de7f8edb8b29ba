"""The shards of checkpoints that real tools wrote are the same bytes in every version."""

import json
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import CHECKPOINTS
from tests.support.paths import DATA
from tests.support.running import split

DIGESTS: dict[str, dict[str, list[str]]] = json.loads((DATA / "cut_digests.json").read_text())


def test_every_checkpoint_has_its_digests() -> None:
    assert sorted(DIGESTS) == sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
    assert all(list(sizes) == ["1", "2", "4"] for sizes in DIGESTS.values())


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_shards_are_the_same_bytes_as_ever(name: str, tp_size: int, tmp_path: Path) -> None:
    result = split(CHECKPOINTS / name, tmp_path / "out", Cut(tp_size))
    assert [shard.blake3 for shard in result.written] == DIGESTS[name][str(tp_size)]
