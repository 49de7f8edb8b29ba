"""One set written by several processes: the bytes of one, whatever happens to any of them."""

import shutil
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import GroupError, UsageError
from reshard.prepare import Cut
from reshard.writer.team import Alone, Place, agree, read_place, share
from tests.builders import Spec, build
from tests.faults import INTERRUPT, KILL, STOP
from tests.forks import TIMEOUT, Fork, Job
from tests.running import reshard, split
from tests.teams import place, processes, torchrun
from tests.test_split_bytes import snapshot
from tests.test_writer import record, shard
from tests.test_writer_faults import SWAP, check_clean, check_left, files_in

SPEC = Spec("modelslim_v0_static", hidden=256, intermediate=1024, dense=1, seed=1)
Files = dict[str, bytes]
KEPT = "run the same command with --resume"


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


# --- a process that fails ---


def test_what_is_refused_fails_the_job(tmp_path: Path, source: Path) -> None:
    (done,) = torchrun(source, tmp_path / "out", "--tp", 5)
    assert done.code == 1
    assert "error: process 0 of 2 (" in done.err
    assert "is not divisible by tp 5" in done.err
    assert not (tmp_path / "out").exists()


STEPS = [
    (1, f"pwrite {shard(2)}~ #1"),
    (1, f"replace {shard(3)} #1"),
    (0, f"pwrite {shard(1)}~ #1"),
    (0, "replace manifest.json #1"),
]


@pytest.mark.parametrize(("process", "step"), STEPS)
def test_a_process_is_killed(tmp_path: Path, source: Path, wanted: Files, process: int, step: str) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    ended = processes(command, command, fault={"process": process, "out": out, "at": step, "action": KILL})
    dead, other = ended[process], ended[1 - process]
    assert dead.code == -signal.SIGKILL, dead
    assert other.code == 1, other
    check_left(files_in(out), wanted)
    assert "manifest.json" not in files_in(out)
    if process:  # with process 0 its store dies, and nobody can tell who did
        assert f"process {process} of 2 (" in other.err.replace(f"error: process {1 - process}", "")
    assert "has died or does not answer" in other.err
    assert KEPT in other.err
    again = [*command, "--resume"]
    assert [done.code for done in processes(again, again)] == [0, 0]
    assert snapshot(out) == wanted


def test_killed_under_torchrun(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    fault = {"process": 1, "out": out, "at": STEPS[0][1], "action": KILL}
    (done,) = torchrun(source, out, "--tp", 4, "--workers", 1, size=3, fault=fault)
    assert done.code == 1
    for other in (0, 2):
        assert f"error: process {other} of 3 (" in done.err
    assert "manifest.json" not in files_in(out)
    check_left(files_in(out), wanted)
    command = [source, out, "--tp", 4, "--resume"]
    assert [done.code for done in processes(command, command, command)] == [0, 0, 0]
    assert snapshot(out) == wanted


def test_torchrun_starts_them_anew(tmp_path: Path, source: Path, wanted: Files) -> None:
    """With the store of those that ended, and what they left in it."""
    out = tmp_path / "out"
    fault = {"process": 1, "out": out, "at": STEPS[1][1], "action": KILL, "run": 0}
    (done,) = torchrun(source, out, "--tp", 4, "--workers", 1, "--resume", restarts=1, fault=fault)
    assert done.code == 0, done.err
    assert "process 1 of 2 (" in done.err
    assert "(kept)" in done.out
    assert snapshot(out) == wanted


@pytest.mark.parametrize(("action", "code"), [("ENOSPC", 1), (INTERRUPT, 130)])
def test_a_process_fails(tmp_path: Path, source: Path, wanted: Files, action: str, code: int) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": 1, "out": out, "at": STEPS[0][1], "action": action}
    first, second = processes(command, command, fault=fault)
    assert (first.code, second.code) == (1, code), (first, second)
    said = "has failed: " if action == "ENOSPC" else "was interrupted; "
    assert f"error: process 0 of 2 ({(host := socket.gethostname())}): process 1 of 2 ({host}) {said}" in first.err
    assert second.err.count("\n") == 1, second.err
    check_clean(files_in(out))
    check_left(files_in(out), wanted)
    assert "manifest.json" not in files_in(out)


def test_a_process_that_does_nothing_more(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": 1, "out": out, "at": STEPS[0][1], "action": STOP, "constants": {"ANSWER_SECONDS": 2.0}}
    first, _ = processes(command, command, fault=fault, last=1)
    assert first.code == 1
    assert "process 1 of 2" in first.err
    assert "has died or does not answer within 2 s" in first.err
    assert "manifest.json" not in files_in(out)


def test_a_process_that_reads_nothing_more(tmp_path: Path, source: Path) -> None:
    """It lives and answers, and its disk does not."""
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    hang = """
import os, threading
real = os.pwrite
def pwrite(*arguments):
    if os.environ["RANK"] == "1":
        threading.Event().wait()
    return real(*arguments)
os.pwrite = pwrite
"""
    fault = {"constants": {"STALLED_SECONDS": 2.0}}
    first, _ = processes(command, command, before=hang, fault=fault, last=1)
    assert first.code == 1
    assert "process 1 of 2" in first.err
    assert "has read and written nothing for 2 s" in first.err
    assert "manifest.json" not in files_in(out)


def test_a_process_that_cannot_show_progress(tmp_path: Path, source: Path, wanted: Files) -> None:
    """Its stderr is closed: neither it nor the others wait for it."""
    command = [source, tmp_path / "out", "--tp", 4]
    closed = """
import os, sys
import reshard.cli.output
class Closed:
    def isatty(self):
        return False
    def flush(self):
        pass
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")
if os.environ["RANK"] == "0":
    reshard.cli.output._LINE_SECONDS = 0.0
    sys.stderr = Closed()
"""
    first, second = processes(command, command, before=closed)
    assert (first.code, second.code) == (1, 1), (first, second)
    assert "process 0 of 2 (" in second.err
    assert "has failed: [Errno 32] Broken pipe" in second.err
    assert snapshot(tmp_path / "out") == wanted, "only the closing line could not be shown"


def test_a_meeting_counts_nothing_that_an_earlier_one_left() -> None:
    """The store may be one from before; whoever comes first waits for the last."""
    pytest.importorskip("torch")
    from torch.distributed import HashStore

    from reshard.writer.gloo import meet

    store = HashStore()
    opened = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            early = [pool.submit(meet, store, Place(number, 3)) for number in (1, 2)]
            assert not wait(early, timeout=0.5).done
            parts = [pool.submit(meet, store, Place(0, 3)), *early]
            for number, part in enumerate(parts):
                part.result(timeout=TIMEOUT).set(f"{number}", f"{number}")
            assert [part.result().get(f"{number}") for number, part in enumerate(parts)] == [b"0", b"1", b"2"]
            opened.append(store.add("reshard/meetings", 0))
    assert opened == [1, 2]


def test_interrupted_while_it_waits_for_the_others(tmp_path: Path, source: Path) -> None:
    """A store that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT)
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
    assert done.err == f"process 1 of 2 ({socket.gethostname()}): interrupted\n"


def test_a_process_that_never_comes(tmp_path: Path, source: Path) -> None:
    fault = {"constants": {"JOIN_SECONDS": 2.0}}
    (alone,) = processes([source, tmp_path / "out", "--tp", 4], size=2, fault=fault)
    assert alone.code == 1
    assert "the 2 processes did not all meet at 127.0.0.1:" in alone.err
    assert "within 2 s" in alone.err
    assert not (tmp_path / "out").exists()


def test_without_torch_the_extra_is_named(tmp_path: Path, source: Path) -> None:
    command = [source, tmp_path / "out", "--tp", 4]
    hidden = "import sys; sys.modules['torch'] = None; del sys.modules['reshard.writer.gloo']"
    for done in processes(command, command, before=hidden):
        assert done.code == 1
        assert "pip install 'reshard[runtime]'" in done.err
        assert done.err.startswith("error: process ")
        assert done.err.count("\n") == 1
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


@pytest.fixture
def old(tmp_path: Path) -> Files:
    """Another model's finished set in `out`."""
    build(tmp_path / "old" / "source", Spec(**{**vars(SPEC), "seed": 3}))
    split(tmp_path / "old" / "source", tmp_path / "out", Cut(2))
    return snapshot(tmp_path / "out")


def test_overwriting(tmp_path: Path, source: Path, wanted: Files, old: Files) -> None:
    command = [source, tmp_path / "out", "--tp", 4, "--overwrite"]
    ended = processes(command, command)
    assert [done.code for done in ended] == [0, 0], ended
    assert snapshot(tmp_path / "out") == wanted


@pytest.mark.parametrize(("process", "step"), [(1, f"fsync {shard(3)}~ #1"), (0, SWAP), (1, f"replace {shard(2)} #1")])
def test_killed_while_overwriting(
    tmp_path: Path, source: Path, wanted: Files, old: Files, process: int, step: str
) -> None:
    out = tmp_path / "out"
    command = [source, out, "--tp", 4, "--workers", 1]
    fault = {"process": process, "out": out, "at": step, "action": KILL}
    ended = processes([*command, "--overwrite"], [*command, "--overwrite"], fault=fault)
    assert ended[process].code == -signal.SIGKILL
    assert ended[1 - process].code == 1
    there = files_in(out)
    if "manifest.json" in there:
        assert {name: there[name] for name in old} == old, "an old manifest beside new shards"
        assert step != f"replace {shard(2)} #1"
        again = [*command, "--overwrite"]
    else:
        again = [*command, "--resume"]
    assert [done.code for done in processes(again, again)] == [0, 0]
    assert snapshot(out) == wanted
