"""Two runs at once: who may write which ranks of a folder, and what is left when they end."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from reshard.errors import BusyError, OutputError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.writer.lock import Lock
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import build
from tests.support.faults import ROOT, TIMEOUT, Job, Server
from tests.writer.test_split_bytes import no_fsync, snapshot  # noqa: F401
from tests.writer.test_writer import LOCK, SPEC, record, shard, split

Files = dict[str, bytes]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    build(tmp_path / "source", SPEC)
    return tmp_path / "source"


@pytest.fixture
def wanted(tmp_path: Path, source: Path) -> Files:
    """The finished set of four."""
    split(source, tmp_path / "wanted")
    return snapshot(tmp_path / "wanted")


HOLDER = """
import sys
from pathlib import Path
from reshard.writer.lock import Lock

ranks = [int(rank) for rank in sys.argv[2].split(",")] if sys.argv[2] else None
lock = Lock(Path(sys.argv[1]))
lock.acquire(ranks)
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


@contextmanager
def held(folder: Path, ranks: tuple[int, ...] | None) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock. It lets go at a line on its stdin."""
    folder.mkdir(exist_ok=True)
    arguments = [sys.executable, "-c", HOLDER, str(folder), ",".join(map(str, ranks or ()))]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=TIMEOUT)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("holder", "mine", "message"),
    [
        (None, None, "another run is writing there"),
        (None, (2,), "another run is writing rank 2 there"),
        ((1,), None, "another run is writing there"),
        ((0, 1), (1, 2), "another run is writing rank 1 there"),
    ],
)
def test_a_second_run_is_refused(
    tmp_path: Path,
    source: Path,
    wanted: Files,
    holder: tuple[int, ...] | None,
    mine: tuple[int, ...] | None,
    message: str,
) -> None:
    out = tmp_path / "out"
    with held(out, holder) as process:
        with pytest.raises(BusyError, match=message) as caught:
            split(source, out, ranks=mine)
        assert caught.value.exit_code == 1
        assert set(snapshot(out)) == {LOCK}
        let_go(process)
    assert snapshot(out) == {}
    split(source, out)
    assert snapshot(out) == wanted


def test_runs_of_other_ranks_go_on_beside(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    with held(out, (0, 1)) as process:
        result = split(source, out, ranks=(2, 3))
        assert result.missing == (0, 1)
        assert LOCK in snapshot(out), "the lock of a run that goes on is removed"
        let_go(process)
    assert set(snapshot(out)) == {shard(2), record(2), shard(3), record(3)}
    split(source, out, ranks=(0, 1))
    assert snapshot(out) == wanted


@pytest.mark.parametrize("ranks", [None, (0, 1)])
def test_a_killed_runs_lock_does_not_block(
    tmp_path: Path,
    source: Path,
    wanted: Files,
    ranks: tuple[int, ...] | None,
) -> None:
    out = tmp_path / "out"
    with held(out, ranks) as process:
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert set(snapshot(out)) == {LOCK}
    split(source, out)
    assert snapshot(out) == wanted


def test_real_runs_of_other_ranks_at_the_same_time(tmp_path: Path, source: Path, wanted: Files) -> None:
    servers = [Server(), Server()]
    try:
        for turn in range(10):
            out = tmp_path / f"out{turn}"
            out.mkdir()
            for server, ranks in zip(servers, ([0, 1], [2, 3]), strict=True):
                server.start(Job(source, out, {"tp_size": 4}, {"ranks": ranks, "workers": 2}))
            outcomes = [server.outcome() for server in servers]
            assert all(outcome.done for outcome in outcomes), outcomes
            assert [] in [outcome.missing for outcome in outcomes], "neither run completed the set"
            there = snapshot(out)
            there.pop(LOCK, None)  # the next test's
            assert there == wanted
    finally:
        for server in servers:
            server.close()


def test_of_two_runs_that_end_together_one_removes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may find the other still there; then neither is the last one out."""
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire([0])
    second.acquire([1])
    real, other = os.close, threading.Thread(target=second.release)

    def close(descriptor: int) -> None:
        if other.ident is None:  # the first run has looked for others, and has not closed yet
            other.start()
            other.join(0.5)  # it ends, or waits for the first one
        real(descriptor)

    monkeypatch.setattr(os, "close", close)
    first.release()
    other.join(TIMEOUT)
    assert not other.is_alive(), f"the second run still waits after {TIMEOUT:.0f} s"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_as_another_ends_gets_a_lock_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the file that the other one then removes: that file's lock would keep nobody out."""
    first, second, third = Lock(tmp_path), Lock(tmp_path), Lock(tmp_path)
    first.acquire(None)
    real, seen = fcntl.fcntl, []

    def request(descriptor: int, *rest: object) -> object:
        if not seen:  # the second run's first request: its file is open
            seen.append(descriptor)
            first.release()
        return real(descriptor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "fcntl", request)
    second.acquire([0])
    monkeypatch.undo()
    assert seen
    assert (tmp_path / LOCK).exists()
    with pytest.raises(BusyError):
        third.acquire([0])
    third.release()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_not_completed_while_its_ranks_are_written(tmp_path: Path, source: Path, wanted: Files) -> None:
    """One run has the last missing ranks; another, at the same time, is replacing those that are there."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    build(elsewhere / "source", replace(SPEC, seed=7))
    split(elsewhere / "source", elsewhere / "wanted")
    split(source, out, ranks=(2, 3))
    started = []

    def meanwhile(nbytes: int) -> None:
        if not started:
            started.append(nbytes)
            split(source, out, ranks=(0, 1))

    with open_source(str(elsewhere / "source")) as opened:
        options = SplitOptions(ranks=(2, 3), overwrite=True, workers=1)
        with suppress(OutputError):
            write_shards(prepare(opened, Cut(4)), out, options, meanwhile)
    assert started
    there = snapshot(out)
    if "manifest.json" in there:
        assert there in (wanted, snapshot(elsewhere / "wanted")), "one manifest for the shards of two sources"
