"""Two runs at once: who may write which ranks of a folder, and what is left when they end."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from reshard.errors import BusyError, OutputError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.writer import lock
from reshard.writer.lock import WriteLease
from reshard.writer.split import SplitOptions, write_shards
from tests.support.faults import TIMEOUT, Job, Started
from tests.support.paths import ROOT
from tests.support.sets import Files, hidden, snapshot, split, with_records

HOLDER = """
import sys
from pathlib import Path
from reshard.writer.lock import WriteLease

ranks = [int(rank) for rank in sys.argv[2].split(",")] if sys.argv[2] else None
lease = WriteLease(Path(sys.argv[1]))
lease.acquire(ranks)
print("held", flush=True)
sys.stdin.readline()
lease.release()
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
        assert sorted(snapshot(out)) == hidden(sorted(snapshot(out)))
        let_go(process)
    assert snapshot(out) == {}
    split(source, out)
    assert snapshot(out) == wanted


def test_runs_of_other_ranks_go_on_beside(tmp_path: Path, source: Path, wanted: Files) -> None:
    out = tmp_path / "out"
    with held(out, (0, 1)) as process:
        result = split(source, out, ranks=(2, 3))
        assert result.missing == (0, 1)
        assert hidden(snapshot(out)), "the lock of a run that goes on is removed"
        let_go(process)
    assert snapshot(out).keys() == with_records((2, 3))
    split(source, out, ranks=(0, 1))
    assert snapshot(out) == wanted


@pytest.mark.parametrize("ranks", [None, (0, 1)])
def test_a_killed_runs_lock_does_not_block(
    tmp_path: Path, source: Path, wanted: Files, ranks: tuple[int, ...] | None
) -> None:
    out = tmp_path / "out"
    with held(out, ranks) as process:
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert hidden(snapshot(out))
    split(source, out)
    assert snapshot(out) == wanted


def test_real_runs_of_other_ranks_at_the_same_time(tmp_path: Path, source: Path, wanted: Files) -> None:
    for turn in range(6):
        out = tmp_path / f"out{turn}"
        jobs = [Job(source, out, {"tp_size": 4}, {"ranks": ranks, "workers": 2}) for ranks in ([0, 1], [2, 3])]
        outcomes = [started.outcome() for started in [*map(Started, jobs)]]
        assert all(outcome.done for outcome in outcomes), outcomes
        assert [] in [outcome.missing for outcome in outcomes], "neither run completed the set"
        assert snapshot(out) == wanted


def test_of_two_runs_that_end_together_the_last_completes_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_RELEASE_SECONDS", 0.1)
    first, second = WriteLease(tmp_path), WriteLease(tmp_path)
    first.acquire([0])
    second.acquire([1])
    assert not first.finish()
    assert second.finish()
    claimed = threading.Thread(target=claim_and_release, args=(tmp_path,))
    claimed.start()
    first.release()
    assert claimed.is_alive(), "a run has begun while the set is completed"
    second.release()
    claimed.join(TIMEOUT)
    assert not claimed.is_alive()
    assert list(tmp_path.iterdir()) == []


def claim_and_release(folder: Path) -> None:
    lease = WriteLease(folder)
    lease.acquire([0])
    lease.release()


def test_a_run_that_starts_as_another_ends_gets_a_lock_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked at the file that the other one then removes: that file's lock would keep nobody out."""
    first, second = WriteLease(tmp_path), WriteLease(tmp_path)
    first.acquire(None)
    real, tried = lock._lock, []

    def late(descriptor: int, path: Path) -> bool:
        tried.append(path.name)
        if len(tried) == 1:
            first.release()
            assert not path.exists()
        return real(descriptor, path)

    monkeypatch.setattr(lock, "_lock", late)
    second.acquire([0])
    monkeypatch.undo()
    assert tried.count(".reshard.lock") == 3  # of the file that is removed, to remove it, of the one that counts
    with pytest.raises(BusyError):
        WriteLease(tmp_path).acquire([0])
    second.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(
    tmp_path: Path, source: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OutputError, match=r"out/\.reshard\.lock: cannot be locked: .*on another file system"):
        split(source, tmp_path / "out")


def test_a_set_is_not_completed_while_its_ranks_are_written(
    tmp_path: Path, source: Path, wanted: Files, other: Path
) -> None:
    """One run has the last missing ranks; another, at the same time, is replacing those that are there."""
    out = tmp_path / "out"
    split(other, tmp_path / "elsewhere")
    split(source, out, ranks=(2, 3))
    started: list[int] = []

    def meanwhile(nbytes: int) -> None:
        if not started:
            started.append(nbytes)
            split(source, out, ranks=(0, 1))

    with open_source(str(other)) as opened:
        options = SplitOptions(ranks=(2, 3), overwrite=True, workers=1)
        with suppress(OutputError):
            write_shards(prepare(opened, Cut(4)), out, options, meanwhile)
    assert started
    there = snapshot(out)
    if "manifest.json" in there:
        assert there in (wanted, snapshot(tmp_path / "elsewhere")), "one manifest for the shards of two sources"
