"""One set written by several processes: the bytes of one. What happens to one: tests/writer/test_team_faults.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import GroupError, UsageError
from reshard.plan.pipeline import Cut
from reshard.writer.team import Alone, Place, agree, read_place, share
from tests.support.builders import Spec, build
from tests.support.running import reshard, split
from tests.support.teams import processes, torchrun
from tests.writer.test_split_bytes import snapshot
from tests.writer.test_writer import record, shard

SPEC = Spec("modelslim_v0_static", hidden=256, intermediate=1024, dense=1, seed=1)
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team") / "source"
    build(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What one process makes of it for four ranks."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    split(source, out, Cut(4))
    return snapshot(out)


# --- who does what ---


@given(st.integers(0, 40), st.integers(1, 20))
def test_the_ranks_are_dealt_out_once_and_evenly(ranks: int, size: int) -> None:
    parts = [share(range(ranks), Place(number, size)) for number in range(size)]
    assert [rank for part in parts for rank in part] == list(range(ranks))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_place_is_what_torchrun_says() -> None:
    said = {"RANK": "2", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_place(said) == Place(2, 6, 3)
    assert not read_place(said).leads
    # A scheduler may set some of them for jobs that are none of torch.distributed's.
    assert read_place({"RANK": "2", "WORLD_SIZE": "6"}) == Place()
    for wrong in ({"RANK": "6"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_WORLD_SIZE": ""}):
        with pytest.raises(UsageError, match=r"start with torchrun, or unset them"):
            read_place({**said, **wrong})


class Others(Alone):
    """A team whose other process gives what it is told to."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self._other = other

    def exchange(self, value: Any) -> list[Any]:
        return [value, self._other]


def test_accounts_that_differ_are_refused_by_name() -> None:
    agree(Others({"tp_size": "4", "a source": "x"}), {"tp_size": "4", "a source": "x"})
    with pytest.raises(GroupError, match=r"process 1 has tp_size 8, process 0 has 4; give every process the same"):
        agree(Others({"tp_size": "8", "a source": "y"}), {"tp_size": "4", "a source": "x"})


# --- the same bytes ---


def test_torchrun_makes_the_set_of_one_process(tmp_path: Path, source: Path, wanted: Files) -> None:
    (done,) = torchrun(source, tmp_path / "out", "--tp", 4, size=3)
    assert done.code == 0, done.err
    assert snapshot(tmp_path / "out") == wanted
    assert done.out == reshard("split", source, tmp_path / "alone", "--tp", 4).out.replace("alone", "out")
    assert done.err.count("split: ") == 1, "progress is the first process's to show"


def test_two_nodes(tmp_path: Path, source: Path, wanted: Files) -> None:
    nodes = torchrun(source, tmp_path / "out", "--tp", 4, "--format", "json", size=1, nodes=2)
    assert [done.code for done in nodes] == [0, 0], nodes
    assert snapshot(tmp_path / "out") == wanted
    (spoken,) = [done for done in nodes if done.out]
    assert [entry["tp_rank"] for entry in spoken.document["shards"]] == [0, 1, 2, 3]
    assert spoken.document["complete"] is True


def test_more_processes_than_ranks(tmp_path: Path, source: Path) -> None:
    command = [source, tmp_path / "out", "--tp", 2, "--pad", "--weights", "keep"]
    ended = processes(command, command, command)
    assert [done.code for done in ended] == [0, 0, 0], ended
    split(source, tmp_path / "alone", Cut(2, pad=True))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")
    assert [bool(done.out) for done in ended] == [True, False, False]


def test_converted_and_padded(tmp_path: Path) -> None:
    build(tmp_path / "source", Spec("fp8_block", intermediate=640, dense=1))
    command = [tmp_path / "source", tmp_path / "out", "--tp", 2, "--weights", "bf16", "--pad", "--layout", "separate"]
    ended = processes(command, command)
    assert [done.code for done in ended] == [0, 0], ended
    split(tmp_path / "source", tmp_path / "alone", Cut(2, "separate", True, "bf16"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")


def test_chosen_ranks_are_divided_and_the_rest_follows(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--ranks", "1-3"]
    first, second = processes(command, command)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "the set still lacks ranks 0" in first.out
    assert snapshot(out).keys() == {name for rank in (1, 2, 3) for name in (shard(rank), record(rank))}
    again = [*command[:4], "--resume", "--format", "json"]
    first, second = processes(again, again)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert [entry["kept"] for entry in first.document["shards"]] == [False, True, True, True]
    assert snapshot(out) == wanted


def test_dry_run_writes_nothing(tmp_path: Path, source: Path) -> None:
    command = [source, tmp_path / "out", "--tp", 4, "--dry-run"]
    first, second = processes(command, command)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "nothing was written" in first.out
    assert second.out + second.err == ""
    assert not (tmp_path / "out").exists()


# --- processes that do not fit together ---


def refused(first: Sequence[object], second: Sequence[object], message: str) -> None:
    for done in processes(first, second):
        assert done.code == 1, done
        assert message in done.err
        assert done.out == ""


def test_commands_that_differ(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    refused([source, out, "--tp", 4], [source, out, "--tp", 2], "has tp_size 2, process 0 of 2 (")
    assert not out.exists()


def test_sources_that_differ(tmp_path: Path, source: Path) -> None:
    """Of one name, with files of the same sizes and headers: only bytes tell them apart."""
    other = tmp_path / "other" / "source"
    build(other, Spec(**{**vars(SPEC), "seed": 2}))
    out = tmp_path / "out"
    refused([source, out, "--tp", 4], [other, out, "--tp", 4], "has a source of bytes ")
    assert not out.exists()


def test_a_source_that_one_host_lacks(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    refused([source, out, "--tp", 4], [tmp_path / "nowhere", out, "--tp", 4], "nowhere: no such folder")
    assert not out.exists()


def test_a_folder_on_each_host(tmp_path: Path, source: Path, wanted: Files) -> None:
    """The first process does not see the other's shards; copied together, the set is completed."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    command = [source, "out", "--tp", 4]
    first, second = processes(command, command, folders=[here, there])
    assert (first.code, second.code) == (1, 1), (first, second)
    assert f"has written {shard(2)}, and process 0 of 2" in first.err
    assert "each host has a folder of its own" in first.err
    assert "--resume" in first.err
    for folder, ranks in ((here, (0, 1)), (there, (2, 3))):
        assert snapshot(folder / "out").keys() == {name for r in ranks for name in (shard(r), record(r))}
    shutil.copytree(there / "out", here / "out", dirs_exist_ok=True)
    done = reshard("split", source, here / "out", "--tp", 4, "--resume")
    assert done.code == 0
    assert done.out.count("(kept)") == 4
    assert snapshot(here / "out") == wanted


# --- overwriting ---


def another_set(folder: Path) -> Files:
    """Another model's finished set in `out`."""
    build(folder / "old" / "source", Spec(**{**vars(SPEC), "seed": 3}))
    split(folder / "old" / "source", folder / "out", Cut(2))
    return snapshot(folder / "out")


def test_overwriting(tmp_path: Path, source: Path, wanted: Files) -> None:
    another_set(tmp_path)
    command = [source, tmp_path / "out", "--tp", 4, "--overwrite"]
    ended = processes(command, command)
    assert [done.code for done in ended] == [0, 0], ended
    assert snapshot(tmp_path / "out") == wanted
