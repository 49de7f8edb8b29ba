"""Ranks whose columns are narrow are written side by side; nobody can tell it from the files."""

import shutil
from pathlib import Path

import pytest

from reshard.errors import SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.writer.neighbours import side_by_side
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, build, dense_only
from tests.support.cut_by_hand import check_set
from tests.support.running import split
from tests.support.sets import snapshot

PADDED = Cut(4, pad=True)  # 251 bytes of each row of down_proj, the last rank 248 and zeros; 1.1 MiB


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "source"
    build(folder, Spec("modelslim_dynamic", hidden=4608, intermediate=1001, dense=1))
    return folder


@pytest.mark.parametrize(
    ("ranks", "workers", "groups"),
    [
        (range(4), 1, [[0, 1, 2, 3]]),
        (range(4), 2, [[0, 1], [2, 3]]),  # each worker has some
        (range(4), 3, [[0], [1], [2], [3]]),
        ((0, 1, 3), 1, [[0, 1], [3]]),  # what lies between is not read for nothing
        ((), 1, []),
    ],
)
def test_who_is_written_together(source: Path, ranks: range, workers: int, groups: list[list[int]]) -> None:
    with open_source(str(source)) as opened:
        plan = prepare(opened, PADDED).plan
        wide = prepare(opened, Cut(1)).plan
    found = side_by_side([plan.shards[rank] for rank in ranks], workers)
    assert [[shard.tp_rank for shard in group] for group in found] == groups
    assert side_by_side(wide.shards, 1) == [[wide.shards[0]]]


def test_the_same_bytes_as_one_by_one(source: Path, tmp_path: Path) -> None:
    dense = dense_only(build(tmp_path / "again", Spec("modelslim_dynamic", hidden=4608, intermediate=1001, dense=1)))
    for workers in (1, 2, 4):
        split(source, tmp_path / str(workers), PADDED, SplitOptions(workers=workers))
    check_set(tmp_path / "1", dense, 4, 251, "fused")
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2") == snapshot(tmp_path / "4")


def test_nothing_is_left_of_a_group_that_failed(source: Path, tmp_path: Path) -> None:
    cut_short = tmp_path / "source"
    shutil.copytree(source, cut_short)
    with open_source(str(cut_short)) as opened:
        prepared = prepare(opened, PADDED)
        for file in cut_short.glob("*.safetensors"):
            with file.open("r+b") as stream:
                stream.truncate(file.stat().st_size // 2)
        with pytest.raises(SourceError, match="cut short after its header was read"):
            write_shards(prepared, tmp_path / "out", SplitOptions(workers=1))
    assert not (tmp_path / "out").exists()
