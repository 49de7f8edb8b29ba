"""Ranks that have columns of the same rows are written in step; nobody can tell it from the files."""

import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from reshard.errors import OutputError, SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.folder import FolderSource
from reshard.source.open import open_source
from reshard.tensors import direct
from reshard.tensors.direct import DirectReader
from reshard.tensors.memory import Bytes
from reshard.writer import neighbours, stream
from reshard.writer.file import DirectFile
from reshard.writer.neighbours import grouped
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, build, dense_only
from tests.support.cut_by_hand import check_set
from tests.support.page_cache import Reads, require_direct_reads
from tests.support.running import reshard_process, split
from tests.support.sets import snapshot

SPEC = Spec("modelslim_dynamic", hidden=1024, intermediate=1001, dense=2)
PADDED = Cut(4, pad=True)  # 251 bytes of each row of down_proj, the last rank 248 and zeros


@pytest.fixture(autouse=True)
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows, for matrices that are far smaller than those which are read so."""
    monkeypatch.setattr(neighbours, "STRIP_BYTES", 16 * 1001)
    monkeypatch.setattr(stream, "STAGE_BYTES", 4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns") / "source"
    build(folder, SPEC)
    return folder


class Counted(FolderSource):
    """The bytes that are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.nbytes = 0
        self._counting = threading.Lock()

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        with self._counting:
            self.nbytes += out.size
        super().read_rows(out, file, start, stride, once)


@pytest.mark.parametrize(
    ("ranks", "workers", "groups"),
    [
        (range(4), 1, [[0, 1, 2, 3]]),
        (range(4), 2, [[0, 1], [2, 3]]),
        (range(4), 3, [[0, 1], [2], [3]]),
        (range(4), 8, [[0], [1], [2], [3]]),
        ((0, 1, 3), 1, [[0, 1], [3]]),  # what lies between is not read for nothing
        ((), 1, []),
    ],
)
def test_who_is_written_in_step(source: Path, ranks: range, workers: int, groups: list[list[int]]) -> None:
    with open_source(str(source)) as opened:
        prepared = prepare(opened, PADDED)
        wide = prepare(opened, Cut(1))
    found = grouped([prepared.plan.shards[rank] for rank in ranks], workers, prepared.readers, lambda nbytes: None)
    assert [[shard.tp_rank for shard in group.shards] for group in found] == groups
    (alone,) = grouped(wide.plan.shards, 1, wide.readers, lambda nbytes: None)
    assert alone.strips is None  # all columns are one rank's


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("held", [1, 2, 4])
def test_every_byte_is_read_once(
    source: Path, tmp_path: Path, workers: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_STRIPS", held)
    split(source, tmp_path / "alone", PADDED, SplitOptions(ranks=(0, 2), workers=1))  # no neighbours
    split(source, tmp_path / "alone", PADDED, SplitOptions(ranks=(1, 3), workers=1))
    with Counted(source) as counted:
        prepared = prepare(counted, PADDED)
        counted.nbytes = 0
        write_shards(prepared, tmp_path / "out", SplitOptions(workers=workers))
    dense = dense_only(build(tmp_path / "again", SPEC))
    weights = {name for name in dense if name.endswith("proj.weight")}
    assert counted.nbytes >= sum(len(dense[name][2]) for name in weights)
    # Small tensors, of which each rank has all, are read for each.
    assert counted.nbytes <= sum(len(dense[name][2]) * (1 if name in weights else 4) for name in dense)
    check_set(tmp_path / "out", dense, 4, math.ceil(1001 / 4), "fused")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")


@pytest.mark.parametrize("workers", [1, 4])
def test_of_a_source_that_is_not_in_the_page_cache(
    source: Path,
    tmp_path: Path,
    workers: int,
    reads: Reads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole blocks are read to where they belong in a strip, the ends of it by way of other memory."""
    monkeypatch.setattr(neighbours, "STRIP_BYTES", 100 * 1001)
    split(source, tmp_path / "cached", PADDED, SplitOptions(workers=workers))
    assert reads.past == 0
    for file in source.glob("*.safetensors"):
        require_direct_reads(file)
    monkeypatch.setattr(direct, "_LEAST", 1)
    monkeypatch.setattr(DirectReader, "_is_cached", lambda reader, start: False)
    split(source, tmp_path / "out", PADDED, SplitOptions(workers=workers))
    dense = dense_only(build(tmp_path / "again", SPEC))
    assert reads.past >= sum(len(raw[2]) for name, raw in dense.items() if name.endswith("proj.weight"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "cached")


def test_strips_are_let_go_of_when_all_are_written(source: Path) -> None:
    """Runs of ranks follow one another, each with strips of its own."""
    with open_source(str(source)) as opened:
        prepared = prepare(opened, PADDED)
        (group,) = grouped(prepared.plan.shards, 1, prepared.readers, lambda nbytes: None)
        assert group.strips is not None
        for number, columns in group.strips.columns.items():
            with group.reading(number, prepared.readers) as (readers, rows):
                out: Bytes = np.empty((columns.rows, 10), np.uint8)
                for top in range(0, columns.rows, rows or 0):
                    readers[columns.tensor].read(out[top : top + (rows or 0)], top, 7)
                    assert group.strips._memory
            prepared.readers[columns.tensor].read(wanted := np.empty_like(out), 0, 7)
            assert (out == wanted).all()
        assert not group.strips._memory


@pytest.mark.parametrize("workers", [1, 4])
def test_a_rank_of_nothing_but_padding(tmp_path: Path, workers: int) -> None:
    """It needs no strip, and nobody waits for it."""
    dense = dense_only(build(tmp_path / "source", Spec("bf16", hidden=512, intermediate=9, dense=1)))
    split(tmp_path / "source", tmp_path / "out", Cut(4, pad=True), SplitOptions(workers=workers))
    check_set(tmp_path / "out", dense, 4, 3, "fused")


@pytest.mark.parametrize("workers", [1, 4])
def test_nothing_is_left_of_a_file_that_was_cut_short(source: Path, tmp_path: Path, workers: int) -> None:
    cut_short = tmp_path / "source"
    shutil.copytree(source, cut_short)
    with open_source(str(cut_short)) as opened:
        prepared = prepare(opened, PADDED)
        for file in cut_short.glob("*.safetensors"):
            with file.open("r+b") as opening:
                opening.truncate(file.stat().st_size // 2)
        with pytest.raises(SourceError, match="cut short after its header was read"):
            write_shards(prepared, tmp_path / "out", SplitOptions(workers=workers))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 3])
def test_who_waits_for_a_worker_that_fails_ends(
    source: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk is full at the first write; the others need strips that it has not left."""
    write = DirectFile.write

    def failing(self: DirectFile, data: memoryview) -> None:
        if f"-0000{rank}-" in self.name:
            raise OutputError("the disk is full")
        write(self, data)

    monkeypatch.setattr(DirectFile, "write", failing)
    with pytest.raises(OutputError, match="the disk is full"):
        split(source, tmp_path / "out", PADDED, SplitOptions(workers=4))
    assert not (tmp_path / "out").exists()


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    build(tmp_path / "source", Spec("bf16", hidden=1024, intermediate=2048, dense=1))
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    done = reshard_process("split", tmp_path / "source", tmp_path / "out", "--tp", 128, "--quiet", before=limit)
    assert done.code == 1
    assert "too many files are open; allow more with `ulimit -n`" in done.err
    assert not (tmp_path / "out").exists()
