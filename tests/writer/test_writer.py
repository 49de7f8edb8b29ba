"""Safe writing: what is refused, what is kept, who may write where, and in which order bytes become durable.

What is left when a run dies or the disk refuses: tests/writer/test_writer_faults.py.
"""

import errno
import fcntl
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import OutputError, SourceError, SpaceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.folder import FolderSource
from reshard.source.open import open_source
from reshard.tensors.memory import Bytes
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, build
from tests.support.faults import TIMEOUT, Steps
from tests.support.forks import reshard as reshard_process
from tests.support.running import reshard
from tests.support.sets import Files, hidden, ranks_of, record, shard, snapshot, split, with_records

# --- what stands in the folder already ---


def test_a_finished_set_is_not_touched_unasked(tmp_path: Path, finished: Path, source: Path, wanted: Files) -> None:
    for options in ({}, {"ranks": (0,)}, {"ranks": (0,), "overwrite": True}):
        with pytest.raises(OutputError, match="holds a finished"):
            split(source, finished, **options)
    with pytest.raises(OutputError, match="shards of tp 4, this split is for tp 2"):
        split(source, finished, tp=2, resume=True)
    assert snapshot(finished) == wanted


def test_an_unfinished_set_is_not_touched_unasked(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    split(source, out, ranks=(1,))
    before = snapshot(out)
    assert before.keys() == with_records((1,))
    with pytest.raises(OutputError, match=r"rank 1's shard of an unfinished set; go on with --resume"):
        split(source, out)
    assert snapshot(out) == before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}, {"ranks": (0,)}], ids=str)
@pytest.mark.parametrize(
    "name", ["notes.txt", "model.safetensors", "config.json", "denseffn.safetensors", "manifest.json"]
)
def test_a_foreign_file_is_refused_and_untouched(tmp_path: Path, source: Path, name: str, options: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"name": "a web app"}')
    with pytest.raises(OutputError) as caught:
        split(source, out, **options)
    assert name in str(caught.value)
    assert snapshot(out) == {name: b'{"name": "a web app"}'}


def test_a_foreign_file_beside_a_set(tmp_path: Path, finished: Path, source: Path, wanted: Files) -> None:
    (finished / "notes.txt").write_text("mine")
    each: list[dict[str, Any]] = [{"overwrite": True}, {"resume": True}]
    for options in each:
        with pytest.raises(OutputError, match=r"holds notes\.txt, which is no part of a shard set"):
            split(source, finished, **options)
    assert snapshot(finished) == {**wanted, "notes.txt": b"mine"}


def test_the_output_is_a_file(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="give a folder"):
        split(source, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("option", ["--quiet", "--overwrite", "--resume"])
@pytest.mark.parametrize("spelling", ["same", "dots", "link"])
def test_out_equal_to_src(tmp_path: Path, finished: Path, source: Path, option: str, spelling: str) -> None:
    """By the command, since the writer knows no paths of its source."""
    for number, folder in enumerate((source, finished)):
        before = snapshot(folder)
        link = tmp_path / f"link{number}"
        link.symlink_to(folder)
        out = {"same": folder, "dots": f"{folder}/../{folder.name}", "link": link}[spelling]
        done = reshard("split", folder, out, "--tp", 2, option)
        assert done.code == 1, done
        assert done.err == f"error: {out}: is the source itself; choose another folder for the shards\n"
        assert snapshot(folder) == before


def test_overwriting_leaves_nothing_of_the_old(tmp_path: Path, source: Path, wanted: Files) -> None:
    build(tmp_path / "other", Spec("bf16", intermediate=640))
    split(tmp_path / "other", tmp_path / "out", tp=2)
    split(source, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == wanted


def test_overwriting_an_unfinished_set_of_another_size(tmp_path: Path, source: Path, wanted: Files) -> None:
    split(source, tmp_path / "out", tp=8, ranks=(0, 5))
    split(source, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == wanted


# --- space ---


def test_too_little_space_is_found_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100_000))
    with pytest.raises(SpaceError, match=r"bytes are to be written, 100,000 are free") as caught:
        split(source, tmp_path / "deep" / "out")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "deep").exists()


def test_too_little_space_leaves_the_old_set(
    tmp_path: Path, finished: Path, source: Path, wanted: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100_000))
    with pytest.raises(SpaceError):
        split(source, finished, tp=2, overwrite=True)
    assert snapshot(finished) == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, timeout=TIMEOUT)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"mount is refused: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=TIMEOUT)


def test_a_disk_that_is_really_full(
    small_disk: Path, source: Path, wanted: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards of 105 KB fit, the third does not; with room made, the command goes on."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    with pytest.raises(SpaceError, match="the disk is full") as caught:
        split(source, small_disk / "out", workers=1)
    assert caught.value.exit_code == 1
    there = snapshot(small_disk / "out")
    assert hidden(there) == []
    assert all(there[name] == wanted[name] for name in there if name.endswith(".safetensors"))
    recorded = [rank for rank in range(4) if record(rank) in there]
    assert recorded in ([], [0], [0, 1])  # the record of a shard may itself find the disk full
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True, timeout=TIMEOUT)
    result = split(source, small_disk / "out", resume=True)
    assert ranks_of(result.kept) == recorded
    assert snapshot(small_disk / "out") == wanted


# --- a source that fails ---


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("calls", [1, 5, 30])
def test_a_source_that_fails_midway(
    tmp_path: Path,
    source: Path,
    wanted: Files,
    other: Path,
    workers: int,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split(other, tmp_path / "old")
    old = snapshot(tmp_path / "old")
    read_rows, seen = FolderSource.read_rows, []

    def failing(self: FolderSource, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        seen.append(file)
        if len(seen) > calls:
            raise SourceError(f"{file}: the disk is failing")
        read_rows(self, out, file, start, stride, once)

    for out, overwrite in ((tmp_path / "old", True), (tmp_path / "new", False)):
        with open_source(str(source)) as opened:
            prepared = prepare(opened, Cut(4))
            seen.clear()
            with monkeypatch.context() as patch:
                patch.setattr(FolderSource, "read_rows", failing)
                with pytest.raises(SourceError, match="the disk is failing"):
                    write_shards(prepared, out, SplitOptions(workers=workers, overwrite=overwrite))
    assert snapshot(tmp_path / "old") == old
    there = snapshot(tmp_path / "new")
    assert all(there[name] == wanted[name] for name in there if name.endswith(".safetensors"))
    assert hidden(there) == []
    split(source, tmp_path / "new", resume=True)
    assert snapshot(tmp_path / "new") == wanted


@pytest.mark.parametrize("number", [2, 3, 4])
def test_interrupted_while_the_work_is_dealt_out(
    tmp_path: Path, source: Path, wanted: Files, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some workers have their shards when Ctrl-C comes before the last has its own."""
    real, dealt = ThreadPoolExecutor.submit, []

    def submit(self: ThreadPoolExecutor, *work: Any) -> Any:
        dealt.append(work)
        if len(dealt) == number:
            raise KeyboardInterrupt
        return real(self, *work)

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            split(source, tmp_path / "out")
    assert len(dealt) == number
    assert hidden(snapshot(tmp_path / "out")) == []
    split(source, tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == wanted


def test_interrupted_within_a_lock(tmp_path: Path, source: Path, wanted: Files) -> None:
    """Ctrl-C may come between any two steps, so also when a Condition has just been locked: no thread waits for it."""
    interrupt = """
import threading
import reshard.writer.split as split
real, real_write = threading.Condition.__enter__, split._Run._write
entered = []
def enter(condition):
    result = real(condition)
    if entered and threading.get_ident() == threading.main_thread().ident:
        entered.append(condition)
        if len(entered) == {number} + 2:
            raise KeyboardInterrupt
    return result
def write(*arguments):
    entered.append(None)
    try:
        return real_write(*arguments)
    finally:
        entered.clear()
threading.Condition.__enter__, split._Run._write = enter, write
"""
    for number in range(10):
        out = tmp_path / str(number)
        done = reshard_process("split", source, out, "--tp", 4, before=interrupt.format(number=number))
        if done.code == 0:
            break
        assert done.code == 130, done
        assert hidden(snapshot(out)) == []
    assert done.code == 0
    assert number > 0
    assert snapshot(out) == wanted


# --- direct writes ---


def test_a_disk_without_direct_writes(
    tmp_path: Path, source: Path, wanted: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.open, []

    def without_direct(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            os.close(real(path, flags & ~os.O_DIRECT, *rest, **options))  # some create it and refuse then
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", without_direct)
    split(source, tmp_path / "out")
    assert len(refused) == 4
    assert snapshot(tmp_path / "out") == wanted


def test_a_disk_that_refuses_direct_writes_late(
    tmp_path: Path, source: Path, wanted: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def refusing(descriptor: int, data: Any, at: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", refusing)
    monkeypatch.setattr("reshard.writer.stream.STAGE_BYTES", 65536)
    split(source, tmp_path / "out")
    assert len(refused) == 4
    assert snapshot(tmp_path / "out") == wanted


@pytest.mark.parametrize("most", [1, 4096, 5000])
def test_a_disk_that_takes_less_than_it_is_given(
    tmp_path: Path, source: Path, wanted: Files, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    limit = {1: 50_000}.get(most, most)  # any number, a page, more than one
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:limit], at))
    split(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == wanted


# --- the order in which things become durable ---


def recorded(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    steps = Steps(out)
    with monkeypatch.context() as patch:
        steps.install(patch.setattr)
        split(source, out, tp=2, workers=1, **options)
    return steps.labels


def check_order(labels: list[str], *wanted: str) -> None:
    """The wanted steps come in this order, whatever else comes between."""
    at = -1
    for label in wanted:
        later = [place for place, found in enumerate(labels) if place > at and found.startswith(label)]
        assert later, f"{label} does not come after {labels[at] if at >= 0 else 'the start'}; the steps: {labels}"
        at = later[0]


def test_data_before_its_name_and_the_manifest_last(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = recorded(source, tmp_path / "out", monkeypatch)
    for rank in range(2):
        name, noted = shard(rank, 2), record(rank, 2)
        check_order(labels, f"create {name}~", f"pwrite {name}~", f"fsync {name}~", f"replace {name}", "fsync .")
        check_order(labels, f"replace {name}", "fsync .", f"fsync {noted}~", f"replace {noted}", "fsync .")
        check_order(labels, f"replace {noted}", "fsync .", "fsync manifest.json~", "replace manifest.json", "fsync .")
        writes = [place for place, label in enumerate(labels) if label.startswith(f"pwrite {name}~")]
        assert max(writes) < labels.index(f"fsync {name}~ #1"), "written to after its fsync"
    renames = [label.split()[1] for label in labels if label.startswith("replace")]
    assert renames[-1] == "manifest.json"
    sides = ["config.json", "quant_model_description.json"]
    assert sorted(renames[:-1]) == sorted([shard(0, 2), shard(1, 2), record(0, 2), record(1, 2), *sides])
    for name in renames:
        check_order(labels, f"fsync {name}~", f"replace {name} ", "fsync .")
    # Records stay until the manifest that takes them over is durable.
    check_order(labels, "replace manifest.json", "fsync .", f"unlink {record(0, 2)}", "fsync .", "unlink .reshard.lock")


def test_a_new_folder_is_made_durable_in_its_parent(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = recorded(source, tmp_path / "out", monkeypatch)
    check_order(labels, "fsync ..", "replace manifest.json")


def test_an_old_manifest_goes_before_the_first_new_shard(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(source, tmp_path / "out", tp=2)
    labels = recorded(source, tmp_path / "out", monkeypatch, overwrite=True)
    first = min(place for place, label in enumerate(labels) if label.startswith("replace denseffn"))
    for name in (shard(0, 2), shard(1, 2)):
        assert labels.index(f"fsync {name}~ #1") < labels.index("replace .manifest.json.replaced #1")
    put_aside = ("replace .manifest.json.replaced", "fsync .", "unlink manifest.json", "fsync .")
    check_order(labels[: first + 1], *put_aside, "replace denseffn")
    check_order(labels[first:], "replace manifest.json", "fsync .")
