"""One set written by several processes: the bytes of one; and what is said where one fails, dies or is absent."""

import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import GroupError, UsageError
from reshard.plan.pipeline import Cut
from reshard.writer.team import Place, Team, agree, read_place, share
from tests.support.builders import Spec, build
from tests.support.faults import INTERRUPT, KILL
from tests.support.forks import Fork, Job
from tests.support.running import TIMEOUT_SECONDS, reshard
from tests.support.sets import Files, record, shard, snapshot, split, with_records
from tests.support.teams import place, processes, torchrun

KEPT = "run the same command with --resume"
HOST = socket.gethostname()
SHORT = {"constants": {"WAIT_SECONDS": 2.0, "JOIN_SECONDS": 2.0}}


def check_left(folder: Path, wanted: Files) -> None:
    """No manifest, and no shard that is not whole."""
    there = snapshot(folder)
    assert "manifest.json" not in there
    assert all(data == wanted[name] for name, data in there.items() if name.endswith(".safetensors"))


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
    for wrong in (
        {"RANK": "6"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "many"},
        {"WORLD_SIZE": "9" * 5000},
        {"LOCAL_WORLD_SIZE": ""},
    ):
        with pytest.raises(UsageError, match=r"start with torchrun, or unset them"):
            read_place({**said, **wrong})


class Others(Team):
    """A team whose other process gives what it is told to."""

    def __init__(self, other: Any) -> None:
        super().__init__(Place(0, 2))
        self._other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self._other]


def test_accounts_that_differ_are_refused_by_name() -> None:
    agree(Others({"tp_size": "4", "a source": "x"}), {"tp_size": "4", "a source": "x"})
    with pytest.raises(GroupError, match=r"process 1 of 2 has tp_size 8, process 0 of 2 has 4; give every process the"):
        agree(Others({"tp_size": "8", "a source": "y"}), {"tp_size": "4", "a source": "x"})


# --- the same bytes ---


def test_two_nodes_make_the_set_of_one_process(tmp_path: Path, source: Path, wanted: Files) -> None:
    nodes = torchrun(source, tmp_path / "out", "--tp", 4, size=2, nodes=2)
    assert [done.code for done in nodes] == [0, 0], nodes
    assert snapshot(tmp_path / "out") == wanted
    alone = reshard("split", source, tmp_path / "alone", "--tp", 4)
    assert sorted(done.out for done in nodes) == ["", alone.out.replace("alone", "out")]
    assert sum(done.err.count("split: ") for done in nodes) == 1, "progress is the first process's to show"


def test_converted_and_padded_by_more_processes_than_ranks(tmp_path: Path) -> None:
    build(tmp_path / "source", Spec("fp8_block", intermediate=640, dense=1))
    command = [tmp_path / "source", tmp_path / "out", "--tp", 2, "--weights", "bf16", "--pad", "--layout", "separate"]
    ended = processes(command, command, command)
    assert [done.code for done in ended] == [0, 0, 0], ended
    split(tmp_path / "source", tmp_path / "alone", cut=Cut(2, "separate", True, "bf16"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")
    assert [bool(done.out) for done in ended] == [True, False, False]


def test_chosen_ranks_are_divided_and_the_rest_follows(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--ranks", "1-3"]
    first, second = processes(command, command)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "the set still lacks ranks 0" in first.out
    assert snapshot(out).keys() == with_records((1, 2, 3))
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


def test_commands_and_sources_that_differ(tmp_path: Path, source: Path, other: Path) -> None:
    """Sources of one name, with files of the same sizes and headers: only bytes tell them apart."""
    out = tmp_path / "out"
    command = [source, out, "--tp", 4]
    refused(command, [source, out, "--tp", 2], f"process 1 of 2 ({HOST}) has tp_size 2, process 0 of 2 ({HOST}) has 4")
    refused(command, [other, out, "--tp", 4], "has a source of bytes ")
    refused(command, [tmp_path / "nowhere", out, "--tp", 4], "nowhere: no such folder")
    refused([source, out, "--tp", 5], [source, out, "--tp", 5], "is not divisible by tp 5")
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
        assert snapshot(folder / "out").keys() == with_records(ranks)
    shutil.copytree(there / "out", here / "out", dirs_exist_ok=True)
    done = reshard("split", source, here / "out", "--tp", 4, "--resume")
    assert done.code == 0
    assert done.out.count("(kept)") == 4
    assert snapshot(here / "out") == wanted


# --- one fails, dies, does not come ---


@pytest.mark.parametrize(("process", "step"), [(1, f"replace {record(3)} #1"), (0, "replace manifest.json #1")])
def test_a_process_is_killed(tmp_path: Path, source: Path, wanted: Files, process: int, step: str) -> None:
    """Where torchrun does not end the others, they wait for a while."""
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": process, "out": out, "at": step, "action": KILL, **SHORT}
    ended = processes(command, command, fault=fault)
    dead, alive = ended[process], ended[1 - process]
    assert dead.code == -signal.SIGKILL, dead
    assert alive.code == 1, alive
    check_left(out, wanted)
    said = "did not come within 2 s" if process else "or torchrun on its host, has ended or does not answer ("
    assert f"error: process {1 - process} of 2 ({HOST}): process {process} of 2 ({HOST})" in alive.err
    assert said in alive.err
    assert KEPT in alive.err
    again = [*command, "--resume"]
    assert [done.code for done in processes(again, again)] == [0, 0]
    assert snapshot(out) == wanted


def test_torchrun_ends_the_others_and_starts_them_anew(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1, "--resume"]
    fault = {"process": 1, "out": out, "at": f"replace {shard(3)} #1", "action": KILL, "run": 0}
    (done,) = torchrun(*command, restarts=1, fault=fault)
    assert done.code == 0, done.err
    assert f"error: process 0 of 2 ({HOST}): told to end, as torchrun does when another process has ended" in done.err
    assert "(kept)" in done.out
    assert snapshot(out) == wanted


@pytest.mark.parametrize(("action", "code"), [("ENOSPC", 1), (INTERRUPT, 130)])
def test_a_process_fails(tmp_path: Path, source: Path, wanted: Files, action: str, code: int) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": 1, "out": out, "at": f"pwrite {shard(2)}~ #1", "action": action}
    first, second = processes(command, command, fault=fault)
    assert (first.code, second.code) == (1, code), (first, second)
    why = f"{out}: the disk is full" if action == "ENOSPC" else "interrupted"
    assert f"error: process 0 of 2 ({HOST}): process 1 of 2 ({HOST}) has failed: {why}" in first.err
    assert second.err.count("\n") == 1, second.err
    check_left(out, wanted)
    assert [name for name in snapshot(out) if name.startswith(".")] == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_alone(tmp_path: Path, source: Path, number: int) -> None:
    commands = [[source, tmp_path / "out", "--tp", 4]]
    (alone,) = processes(*commands, size=2, first=number, fault=SHORT)
    assert alone.code == 1
    absent = "process 1 of 2 did not come within 2 s" if number == 0 else "no meeting of the 2 processes at 127.0.0.1:"
    assert absent in alone.err
    assert "unset RANK and WORLD_SIZE to run alone" in alone.err
    assert alone.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interrupted_while_it_waits_for_the_others(tmp_path: Path, source: Path) -> None:
    """A store that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT_SECONDS)
        arguments = ["split", str(source), str(tmp_path / "out"), "--tp", "4"]
        process = Fork(Job(arguments, place(1, 2, silent.getsockname()[1])), tmp_path)
        try:
            connection, _ = silent.accept()
            with connection:
                process.kill(signal.SIGINT)
                done = process.done()
        finally:
            process.kill()
    assert (done.code, done.out) == (130, "")
    assert done.err == f"process 1 of 2 ({HOST}): interrupted\n"


def test_without_torch_the_extra_is_named(tmp_path: Path, source: Path) -> None:
    command = [source, tmp_path / "out", "--tp", 4]
    hidden = "import sys; sys.modules['torch'] = sys.modules['torch.distributed'] = None"
    for done in processes(command, command, before=hidden):
        assert done.code == 1
        assert "pip install torch; or unset RANK" in done.err
        assert done.err.startswith("error: process ")
        assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- overwriting ---


@pytest.mark.parametrize(
    ("process", "step"),
    [(None, ""), (0, "unlink manifest.json #1"), (1, f"replace {shard(2)} #1")],
)
def test_overwriting(tmp_path: Path, source: Path, wanted: Files, other: Path, process: int | None, step: str) -> None:
    """Undisturbed, and where a process is killed."""
    out = tmp_path / "out"
    split(other, out, 2)
    old = snapshot(out)
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": process, "out": out, "at": step, "action": KILL, **SHORT}
    ended = processes([*command, "--overwrite"], [*command, "--overwrite"], fault=fault)
    if process is not None:
        assert ended[process].code == -signal.SIGKILL
        assert ended[1 - process].code == 1
        there = snapshot(out)
        if "manifest.json" in there:
            assert {name: there[name] for name in old} == old, "an old manifest beside new shards"
        assert ("manifest.json" in there) == (step != f"replace {shard(2)} #1")
        again = [*command, "--overwrite" if "manifest.json" in there else "--resume"]
        ended = processes(again, again)
    assert [done.code for done in ended] == [0, 0], ended
    assert snapshot(out) == wanted
