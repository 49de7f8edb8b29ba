"""One set written by several processes, one of which fails, dies, hangs, comes late or not at all."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from reshard.writer.team import Place
from tests.support.builders import build
from tests.support.faults import INTERRUPT, KILL, STOP
from tests.support.forks import Fork, Job
from tests.support.running import TIMEOUT_SECONDS, split
from tests.support.teams import place, processes, torchrun
from tests.writer.test_split_bytes import snapshot
from tests.writer.test_team import SPEC, Files, another_set
from tests.writer.test_writer import record, shard
from tests.writer.test_writer_faults import SWAP, check_clean, check_left, files_in

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


def test_what_is_refused_fails_the_job(tmp_path: Path, source: Path) -> None:
    (done,) = torchrun(source, tmp_path / "out", "--tp", 5)
    assert done.code == 1
    assert "error: process 0 of 2 (" in done.err
    assert "is not divisible by tp 5" in done.err
    assert not (tmp_path / "out").exists()


STEPS = [
    (1, f"pwrite {shard(2)}~ #1"),
    (1, f"replace {shard(3)} #1"),
    (1, f"replace {record(3)} #1"),
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
                part.result(timeout=TIMEOUT_SECONDS).set(f"{number}", f"{number}")
            assert [part.result().get(f"{number}") for number, part in enumerate(parts)] == [b"0", b"1", b"2"]
            opened.append(store.add("reshard/meetings", 0))
    assert opened == [1, 2]


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


@pytest.mark.parametrize(("process", "step"), [(1, f"fsync {shard(3)}~ #1"), (0, SWAP), (1, f"replace {shard(2)} #1")])
def test_killed_while_overwriting(tmp_path: Path, source: Path, wanted: Files, process: int, step: str) -> None:
    out = tmp_path / "out"
    old = another_set(tmp_path)
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
