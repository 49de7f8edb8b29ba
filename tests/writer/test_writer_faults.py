"""Killed, or refused by the disk, at the steps of a split: what is left, and that `--resume` mends it.

The steps are the labels of tests.support.faults; each test first runs undisturbed to learn them.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reshard.writer.folder import OutputFolder
from tests.support.builders import Spec, build
from tests.support.faults import INTERRUPT, TIMEOUT, Job, Outcome, run
from tests.support.paths import ROOT
from tests.support.running import signalled
from tests.support.sets import Files, hidden, snapshot

OLD = Spec("modelslim_v0_static", hidden=128, intermediate=512, dense=1, seed=1)
NEW = Spec("modelslim_v0_static", hidden=128, intermediate=512, dense=1, seed=2)
CUT = {"tp_size": 2}  # shards of 110 kB: two writes each
REPLACED = ".manifest.json.replaced"
SWAP = "unlink manifest.json #1"  # from here on an old set gives way to the new one


def is_shard(name: str) -> bool:
    return name.startswith("denseffn-") and name.endswith(".safetensors")


def is_whole(there: Files, wanted: Files) -> bool:
    """Whether a set is there, whatever else is."""
    return all(there.get(name) == data for name, data in wanted.items())


def check_left(there: Files, *sets: Files) -> None:
    """No manifest or one of the sets, whole; and no incomplete file under a shard's name."""
    if "manifest.json" in there:
        assert any(is_whole(there, wanted) for wanted in sets), "a manifest beside files that are not its own"
    for name in filter(is_shard, there):
        assert there[name] in [wanted.get(name) for wanted in sets], f"{name} is incomplete"


def finished(job: Job, after: str = "nothing") -> tuple[Outcome, Files]:
    """A run without faults, and what it leaves. `after`: what came before, for messages."""
    outcome = run(job)
    assert outcome.done, f"after {after}: {outcome}"
    return outcome, snapshot(job.out)


def chosen(labels: Sequence[str], *without: str) -> list[str]:
    """Of steps that are alike the first and the last. Locks are taken and left again and again: each counts once."""
    first = {label.rpartition(" ")[0]: label for label in reversed(labels)}
    last = {label.rpartition(" ")[0]: label for label in labels if ".lock " not in label}
    ends = {*first.values(), *last.values()}
    return [label for label in labels if label in ends and not label.startswith(without or ("-",))]


# --- a new folder, one with half a set, one with the ranks of others ---


class Case:
    """A run in a folder that holds something already: its steps, what it makes, and a fresh copy for each fault."""

    def __init__(self, folder: Path, begun: Path | None, tp: int, **options: Any) -> None:
        self.folder, self.begun = folder, begun
        self.cut, self.options = {"tp_size": tp}, options
        undisturbed, self.wanted = finished(self.job())
        self.labels = undisturbed.labels

    def job(self, at: str | None = None, action: str = "kill", **options: Any) -> Job:
        out = self.folder / "out"
        if at is not None or not out.exists():
            shutil.rmtree(out, ignore_errors=True)
            if self.begun:
                shutil.copytree(self.begun, out)
        return Job(self.folder / "source", out, self.cut, {**self.options, **options}, at=at, action=action)

    def resumed(self, label: str) -> Outcome:
        outcome, there = finished(self.job(resume=True, overwrite=False), label)
        assert there == self.wanted, f"{label}: other files"
        return outcome


@pytest.fixture(params=["new", "half", "ranks"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    build(tmp_path / "source", NEW)
    begun = tmp_path / "begun"
    if request.param == "new":
        return Case(tmp_path, None, 2, workers=2)
    if request.param == "half":
        at = "replace denseffn-rank-00001-of-00002.safetensors #1"
        assert run(Job(tmp_path / "source", begun, CUT, at=at)).killed
        return Case(tmp_path, begun, 2, resume=True)
    # Nobody need run the whole command: each host goes on with its own ranks, and nothing is left behind.
    finished(Job(tmp_path / "source", begun, {"tp_size": 4}, {"ranks": [0, 1]}))
    return Case(tmp_path, begun, 4, ranks=[2, 3])


def test_killed_at_every_step(case: Case) -> None:
    steps = chosen(case.labels)
    assert len(steps) > 20
    for label in steps:
        job = case.job(at=label)
        outcome = run(job)
        assert outcome.killed, f"{label}: {outcome}"
        check_left(snapshot(job.out), case.wanted)
        resumed = case.resumed(label)
        assert not (case.begun and case.options.get("resume")) or 0 in resumed.kept


@pytest.mark.parametrize(
    ("action", "kind", "workers"), [("ENOSPC", "SpaceError", 2), ("EIO", "OutputError", 1), (INTERRUPT, "", 1)]
)
def test_refused_or_interrupted_at_every_step(tmp_path: Path, action: str, kind: str, workers: int) -> None:
    """Ctrl-C is no fault: what is finished stays, what is not is removed."""
    build(tmp_path / "source", NEW)
    case = Case(tmp_path, None, 2, workers=workers)
    steps = chosen(case.labels, "unlink")  # the set is complete, and is being tidied up
    assert len(steps) > 20
    for label in steps:
        job = case.job(at=label, action=action)
        outcome = run(job)
        assert outcome.error is not None, f"{label}: {outcome}"
        said = (kind, 1) if kind else ("unexpected KeyboardInterrupt", -1)
        assert outcome.error[:2] == said, f"{label}: {outcome.error}"
        there = snapshot(job.out)
        assert hidden(there) == [], label
        check_left(there, case.wanted)
        if label == "create .reshard.lock #1":
            assert not job.out.exists(), "an empty folder is left"
        recorded = {name for name in there if name.endswith(".record.json")}
        assert len(recorded) <= len(case.resumed(label).kept), f"{label}: a finished shard was written again"


# --- a finished set that is overwritten ---


@pytest.fixture(params=[2, 1])
def swap(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, Files]:
    """The overwriting of another source's set of two, and that old set."""
    build(tmp_path / "a" / "source", OLD)
    build(tmp_path / "source", NEW)
    _, old = finished(Job(tmp_path / "a" / "source", tmp_path / "old", CUT))
    case = Case(tmp_path, tmp_path / "old", request.param, overwrite=True)
    assert not is_whole(case.wanted, old)
    return case, old


def parts_of(case: Case) -> tuple[list[str], list[str]]:
    """The steps up to the swap, and those behind."""
    at = case.labels.index(SWAP)
    steps = chosen(case.labels)
    before = [label for label in steps if label in case.labels[: at + 1]]
    return before, [label for label in steps if label not in before]


def test_killed_while_overwriting(swap: tuple[Case, Files]) -> None:
    case, old = swap
    before, behind = parts_of(case)
    assert len(before) > 4
    assert len(behind) > 10
    for label in before:
        job = case.job(at=label)
        assert run(job).killed, label
        assert is_whole(snapshot(job.out), old), f"killed at {label}: the old set is not whole"
        _, there = finished(case.job(), label)
        assert there == case.wanted, f"killed at {label}"
    for label in behind:
        job = case.job(at=label)
        assert run(job).killed, label
        check_behind(snapshot(job.out), old, case.wanted, label)
        case.resumed(label)


def check_behind(there: Files, old: Files, new: Files, label: str) -> None:
    assert "manifest.json" not in there or is_whole(there, new), f"{label}: a false manifest"
    for name in filter(is_shard, there):
        assert there[name] in (old.get(name), new.get(name)), f"{label}: {name}"


@pytest.mark.parametrize(("action", "kind"), [("ENOSPC", "SpaceError"), ("EIO", "OutputError")])
def test_refused_while_overwriting(swap: tuple[Case, Files], action: str, kind: str) -> None:
    case, old = swap
    before, behind = parts_of(case)
    for label in before + behind:
        if label.startswith("unlink") and label != SWAP:
            continue
        job = case.job(at=label, action=action)
        outcome = run(job)
        assert outcome.error is not None, f"{label}: {outcome}"
        assert outcome.error[:2] == (kind, 1), f"{label}: {outcome.error}"
        there = snapshot(job.out)
        assert [name for name in hidden(there) if name != REPLACED] == [], label
        if label in before:
            there.pop(REPLACED, None)
            assert there == old, f"{action} at {label}: the old set is touched"
        else:
            check_behind(there, old, case.wanted, label)
            case.resumed(label)


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


def shows(out: Path, moment: str) -> bool:
    return out.is_dir() and MOMENTS[moment](os.listdir(out))


@pytest.mark.parametrize(
    ("number", "status", "moment"),
    [(signal.SIGKILL, -9, moment) for moment in MOMENTS]
    + [
        (number, status, "the first temporary file")
        for number, status in ((signal.SIGTERM, 143), (signal.SIGXCPU, 152), (signal.SIGINT, 130))
    ],
)
def test_the_command_is_killed(
    tmp_path: Path, large: tuple[Path, Files], number: signal.Signals, status: int, moment: str
) -> None:
    source, wanted = large
    for attempt in range(5):  # a busy machine may let the command end before it is killed
        out = tmp_path / str(attempt)
        ended = signalled(command(source, out), number, partial(shows, out, moment))
        if ended != 0:
            break
    else:
        pytest.fail(f"the command always ended before it could be killed at {moment}")
    assert ended == status
    there = snapshot(out)
    check_left(there, wanted)
    if number != signal.SIGKILL:
        assert hidden(there) == [], "asked to end, it tidies up"
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
