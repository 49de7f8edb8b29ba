"""Killed, or refused by the disk, at every step of a split: what is left, and that `--resume` mends it.

The steps are the labels of tests.support.faults; each test first runs undisturbed to learn them.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reshard.writer.folder import OutputFolder
from tests.support.builders import Spec, build
from tests.support.faults import INTERRUPT, ROOT, TIMEOUT, Job, Outcome, Server
from tests.writer.test_split_bytes import snapshot

OLD = Spec("modelslim_v0_static", hidden=128, intermediate=512, dense=1, seed=1)
NEW = Spec("modelslim_v0_static", hidden=128, intermediate=512, dense=1, seed=2)
CUT = {"tp_size": 2}  # shards of 110 kB: two writes each
SWAP = "replace .manifest.json.replaced #1"  # from here on an old set gives way to the new one

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def is_shard(name: str) -> bool:
    return name.startswith("denseffn-") and name.endswith(".safetensors")


def files_in(folder: Path) -> Files:
    return snapshot(folder) if folder.exists() else {}


def is_whole(there: Files, wanted: Files) -> bool:
    """Whether a set is there, whatever else is."""
    return all(there.get(name) == data for name, data in wanted.items())


def check_left(there: Files, *sets: Files) -> None:
    """No manifest or one of the sets, whole; and no incomplete file under a shard's name."""
    if "manifest.json" in there:
        assert any(is_whole(there, wanted) for wanted in sets), "a manifest beside files that are not its own"
    for name in filter(is_shard, there):
        assert there[name] in [wanted.get(name) for wanted in sets], f"{name} is incomplete"


def check_clean(there: Files) -> None:
    """Neither temporary files nor a lock."""
    assert [name for name in there if name.endswith((".tmp", ".lock"))] == []


def finished(server: Server, job: Job, after: str = "nothing") -> tuple[Outcome, Files]:
    """A run without faults, and what it leaves. `after`: what came before, for messages."""
    outcome = server.run(job)
    assert outcome.done, f"after {after}: {outcome}"
    return outcome, snapshot(job.out)


# --- a new folder ---


def test_killed_at_every_step(server: Server, tmp_path: Path) -> None:
    build(tmp_path / "source", NEW)
    options = {"workers": 2}
    undisturbed, wanted = finished(server, Job(tmp_path / "source", tmp_path / "whole", CUT, options))
    assert len(undisturbed.labels) > 30
    assert "pwrite denseffn-rank-00001-of-00002.safetensors~ #2" in undisturbed.labels
    for label in undisturbed.labels:
        out = tmp_path / "out"
        outcome = server.run(Job(tmp_path / "source", out, CUT, options, at=label))
        assert outcome.killed, f"{label}: {outcome}"
        check_left(files_in(out), wanted)
        finished(server, Job(tmp_path / "source", out, CUT, {**options, "resume": True}), label)
        assert snapshot(out) == wanted, f"killed at {label}"
        shutil.rmtree(out)


def test_a_resumed_run_killed_at_every_step(server: Server, tmp_path: Path) -> None:
    build(tmp_path / "source", NEW)
    _, wanted = finished(server, Job(tmp_path / "source", tmp_path / "whole", CUT))
    begun = tmp_path / "begun"
    at = "replace denseffn-rank-00001-of-00002.safetensors #1"
    assert server.run(Job(tmp_path / "source", begun, CUT, at=at)).killed
    shutil.copytree(begun, tmp_path / "resumed")
    undisturbed, _ = finished(server, Job(tmp_path / "source", tmp_path / "resumed", CUT, {"resume": True}))
    assert (undisturbed.kept, undisturbed.written) == ([0], [1])
    for label in undisturbed.labels:
        out = tmp_path / "out"
        shutil.copytree(begun, out)
        assert server.run(Job(tmp_path / "source", out, CUT, {"resume": True}, at=label)).killed, label
        check_left(files_in(out), wanted)
        resumed, _ = finished(server, Job(tmp_path / "source", out, CUT, {"resume": True}), label)
        assert 0 in resumed.kept
        assert snapshot(out) == wanted, f"killed at {label}"
        shutil.rmtree(out)


@pytest.mark.parametrize("ranks", [[0, 1], [2, 3]])
def test_a_run_of_some_ranks_killed_at_every_step(server: Server, tmp_path: Path, ranks: list[int]) -> None:
    """Nobody need run the whole command: each host goes on with its own ranks, and nothing is left behind."""
    build(tmp_path / "source", NEW)
    cut = {"tp_size": 4}
    _, wanted = finished(server, Job(tmp_path / "source", tmp_path / "whole", cut))
    others = [rank for rank in range(4) if rank not in ranks]
    begun = tmp_path / "begun"
    finished(server, Job(tmp_path / "source", begun, cut, {"ranks": others}))
    shutil.copytree(begun, tmp_path / "undisturbed")
    undisturbed, there = finished(server, Job(tmp_path / "source", tmp_path / "undisturbed", cut, {"ranks": ranks}))
    assert there == wanted
    for label in undisturbed.labels:
        out = tmp_path / "out"
        shutil.copytree(begun, out)
        assert server.run(Job(tmp_path / "source", out, cut, {"ranks": ranks}, at=label)).killed, label
        check_left(files_in(out), wanted)
        finished(server, Job(tmp_path / "source", out, cut, {"ranks": ranks, "resume": True}), label)
        assert snapshot(out).keys() == wanted.keys(), f"killed at {label}"
        assert snapshot(out) == wanted, f"killed at {label}"
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("action", "kind", "workers"), [("ENOSPC", "SpaceError", 1), ("ENOSPC", "SpaceError", 2), ("EIO", "OutputError", 1)]
)
def test_refused_at_every_step(server: Server, tmp_path: Path, action: str, kind: str, workers: int) -> None:
    build(tmp_path / "source", NEW)
    options = {"workers": workers}
    undisturbed, wanted = finished(server, Job(tmp_path / "source", tmp_path / "whole", CUT, options))
    steps = [label for label in undisturbed.labels if not label.startswith("unlink")]
    assert len(steps) > 25
    for label in steps:
        out = tmp_path / "out"
        outcome = server.run(Job(tmp_path / "source", out, CUT, options, at=label, action=action))
        assert outcome.error is not None, f"{label}: {outcome}"
        assert outcome.error[:2] == (kind, 1), f"{label}: {outcome.error}"
        there = files_in(out)
        check_clean(there)
        check_left(there, wanted)
        if label == "create .reshard.lock #1":
            assert not out.exists(), "an empty folder is left"
        resumed, _ = finished(server, Job(tmp_path / "source", out, CUT, {**options, "resume": True}), label)
        recorded = {name for name in there if name.endswith(".record.json")}
        assert len(recorded) <= len(resumed.kept), f"{label}: a finished shard was written again"
        assert snapshot(out) == wanted, f"{action} at {label}"
        shutil.rmtree(out)


def test_interrupted_at_every_step(server: Server, tmp_path: Path) -> None:
    """Ctrl-C is no fault: what is finished stays, what is not is removed."""
    build(tmp_path / "source", NEW)
    undisturbed, wanted = finished(server, Job(tmp_path / "source", tmp_path / "whole", CUT))
    for label in undisturbed.labels:
        if label.startswith("unlink"):
            continue  # the set is complete, and is being tidied up
        out = tmp_path / "out"
        outcome = server.run(Job(tmp_path / "source", out, CUT, at=label, action=INTERRUPT))
        assert outcome.error is not None, f"{label}: {outcome}"
        assert outcome.error[0] == "unexpected KeyboardInterrupt", f"{label}: {outcome.error}"
        there = files_in(out)
        check_clean(there)
        check_left(there, wanted)
        finished(server, Job(tmp_path / "source", out, CUT, {"resume": True}), label)
        assert snapshot(out) == wanted, f"interrupted at {label}"
        shutil.rmtree(out)


# --- a finished set that is overwritten ---


@pytest.fixture(params=[{"tp_size": 2}, {"tp_size": 4}, {"tp_size": 1}], ids=str)
def swap(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> dict[str, Any]:
    """An old set, and what another source's makes of it: the steps up to the swap, those behind, the new files."""
    build(tmp_path / "a" / "source", OLD)
    build(tmp_path / "b" / "source", NEW)
    _, old = finished(server, Job(tmp_path / "a" / "source", tmp_path / "old", CUT))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    job = Job(tmp_path / "b" / "source", tmp_path / "new", request.param, {"overwrite": True})
    undisturbed, new = finished(server, job)
    assert not is_whole(new, old)
    at = undisturbed.labels.index(SWAP)
    assert at > 4
    return {
        "cut": request.param,
        "old": old,
        "new": new,
        "before": undisturbed.labels[: at + 1],
        "behind": undisturbed.labels[at + 1 :],
    }


def overwrite(tmp_path: Path, swap: dict[str, Any], **fault: str) -> Job:
    """The overwriting of a fresh copy of the old set."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    return Job(tmp_path / "b" / "source", tmp_path / "out", swap["cut"], {"overwrite": True}, **fault)


def test_killed_before_the_swap(server: Server, tmp_path: Path, swap: dict[str, Any]) -> None:
    for label in swap["before"]:
        job = overwrite(tmp_path, swap, at=label)
        assert server.run(job).killed, label
        assert is_whole(snapshot(job.out), swap["old"]), f"killed at {label}: the old set is not whole"
        _, there = finished(server, Job(job.source, job.out, job.cut, job.options), label)
        assert there == swap["new"], f"killed at {label}"


def test_killed_in_the_swap(server: Server, tmp_path: Path, swap: dict[str, Any]) -> None:
    assert len(swap["behind"]) > 10
    for label in swap["behind"]:
        job = overwrite(tmp_path, swap, at=label)
        assert server.run(job).killed, label
        there = snapshot(job.out)
        assert "manifest.json" not in there or is_whole(there, swap["new"]), f"killed at {label}: a false manifest"
        for name in filter(is_shard, there):
            assert there[name] in (swap["old"].get(name), swap["new"].get(name)), f"killed at {label}: {name}"
        _, there = finished(server, Job(job.source, job.out, job.cut, {"resume": True}), label)
        assert there == swap["new"], f"killed at {label}"


@pytest.mark.parametrize(("action", "kind"), [("ENOSPC", "SpaceError"), ("EIO", "OutputError")])
def test_refused_before_the_swap(server: Server, tmp_path: Path, swap: dict[str, Any], action: str, kind: str) -> None:
    for label in swap["before"]:
        job = overwrite(tmp_path, swap, at=label, action=action)
        outcome = server.run(job)
        assert outcome.error is not None, f"{label}: {outcome}"
        assert outcome.error[:2] == (kind, 1), f"{label}: {outcome.error}"
        assert snapshot(job.out) == swap["old"], f"{action} at {label}: the old set is touched"


def test_refused_in_the_swap(server: Server, tmp_path: Path, swap: dict[str, Any]) -> None:
    for label in swap["behind"]:
        if label.startswith("unlink"):
            continue
        job = overwrite(tmp_path, swap, at=label, action="ENOSPC")
        outcome = server.run(job)
        assert outcome.error is not None, f"{label}: {outcome}"
        assert outcome.error[:2] == ("SpaceError", 1), f"{label}: {outcome.error}"
        there = snapshot(job.out)
        check_clean(there)
        assert "manifest.json" not in there or is_whole(there, swap["new"]), f"{label}: a false manifest"
        _, there = finished(server, Job(job.source, job.out, job.cut, {"resume": True}), label)
        assert there == swap["new"], f"ENOSPC at {label}"


# --- the command itself ---


def shards_in(names: list[str]) -> int:
    return sum(map(is_shard, names))


MOMENTS: dict[str, Callable[[list[str]], bool]] = {
    "the folder": lambda names: True,
    "the first temporary file": lambda names: any(name.endswith(".tmp") for name in names),
    "the first finished shard": lambda names: shards_in(names) > 0,
    "the last finished shard": lambda names: shards_in(names) == 8,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """A source of 64 MB, and the set that it makes."""
    folder = tmp_path_factory.mktemp("large")
    build(folder / "source", Spec("fp32", hidden=1024, intermediate=2688, dense=2))
    whole = command(folder / "source", folder / "whole")
    subprocess.run(whole, cwd=ROOT, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
    return folder / "source", snapshot(folder / "whole")


def command(source: Path, out: Path, *options: str) -> list[str]:
    arguments = ["split", str(source), str(out), "--tp", "8", "--workers", "2", "--format", "json", *options]
    return [sys.executable, "-m", "reshard", *arguments]


def signal_at(arguments: list[str], out: Path, moment: str, number: signal.Signals) -> int:
    """Run a command and send it a signal when the folder shows the moment. Returns its exit status."""
    deadline = time.monotonic() + TIMEOUT
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                seen = MOMENTS[moment](os.listdir(out))
            except FileNotFoundError:
                seen = False
            if seen:
                process.send_signal(number)
                break
            assert time.monotonic() < deadline, f"{moment} was not seen within {TIMEOUT:.0f} s"
        try:
            return process.wait(TIMEOUT)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "status", "moment"),
    [(signal.SIGKILL, -9, moment) for moment in MOMENTS]
    + [(signal.SIGTERM, 143, "the first temporary file"), (signal.SIGINT, 130, "the first temporary file")],
)
def test_the_command_is_killed(
    tmp_path: Path, large: tuple[Path, Files], number: signal.Signals, status: int, moment: str
) -> None:
    source, wanted = large
    for attempt in range(5):  # a busy machine may let the command end before it is killed
        out = tmp_path / str(attempt)
        ended = signal_at(command(source, out), out, moment, number)
        if ended != 0:
            break
    else:
        pytest.fail(f"the command always ended before it could be killed at {moment}")
    assert ended == status
    there = files_in(out)
    check_left(there, wanted)
    if number != signal.SIGKILL:
        check_clean(there)  # asked to end, it tidies up
    resume = command(source, out, "--resume")
    subprocess.run(resume, cwd=ROOT, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
    assert snapshot(out) == wanted


def test_a_temporary_file_that_cannot_be_removed(tmp_path: Path) -> None:
    """What went wrong first is what the user hears of, and the others are removed."""
    folder = OutputFolder(tmp_path)
    first, stuck = folder.temporary("a"), folder.temporary("b")
    first.write_bytes(b"")
    stuck.mkdir()
    folder.remove_own_temporaries()
    assert list(tmp_path.iterdir()) == [stuck]
