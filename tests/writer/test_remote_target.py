"""Shard sets in object stores: the bytes of a folder's, the manifest as commit, faults in the middle.

memory:// has every rule that S3 has; S3 itself is moto's server, by the real client.
"""

import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reshard import limits
from reshard.errors import OutputError, SourceError, SpaceError, UsageError
from reshard.manifest import Shard
from reshard.plan.pipeline import Cut, prepare
from reshard.source.filesystems import same_place
from reshard.source.folder import FolderSource
from reshard.source.open import open_source
from reshard.tensors.memory import Bytes
from reshard.workers import Cancelled
from reshard.writer.file import DirectFile
from reshard.writer.open import open_target
from reshard.writer.remote import RemoteTarget
from reshard.writer.split import SplitOptions, SplitResult, write_shards
from tests.support.forks import reshard as reshard_process
from tests.support.hub_server import Asked, Handler, Hub, bucket_list, serving
from tests.support.paths import ROOT
from tests.support.running import TIMEOUT_SECONDS, reshard
from tests.support.s3 import KEY, SECRET, Server, environment
from tests.support.sets import Files, ranks_of, record, shard, snapshot, with_records
from tests.support.teams import processes


def split(source: Path, out: Path | str, tp: int = 4, **options: Any) -> SplitResult:
    with open_source(str(source)) as opened:
        return write_shards(prepare(opened, Cut(tp)), out, SplitOptions(**{"workers": 2, **options}))


def objects(address: str) -> Files:
    """Everything below an address; not the empty object that stands for a folder."""
    fs, root = fsspec.url_to_fs(address)
    fs.invalidate_cache()
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(root) if name.rstrip("/") != root}


def put(address: str, name: str, data: bytes) -> None:
    fs, root = fsspec.url_to_fs(address)
    fs.pipe_file(f"{root}/{name}", data)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where shards are made before they are put; nothing stays there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", partial(tempfile.TemporaryDirectory, dir=folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty address."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield "memory://sets/tp4"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


# --- the set ---


def test_the_objects_are_the_folder_s_files(source: Path, wanted: Files, memory: str) -> None:
    done = reshard("split", source, memory + "/", "--tp", 4)
    assert done.code == 0, done.err
    assert f"wrote {memory}/manifest.json: the set is complete" in done.out
    assert objects(memory) == wanted


def test_a_file_address_is_a_folder(tmp_path: Path, source: Path, wanted: Files) -> None:
    assert reshard("split", source, f"file://{tmp_path}/out", "--tp", 4).code == 0
    assert snapshot(tmp_path / "out") == wanted
    done = reshard("split", f"{source}", f"file://{source}", "--tp", 4)
    assert "is the source itself" in done.err
    config = ROOT / "configs" / "deepseek-v2-lite.json"
    done = reshard("synth", config, f"file://{tmp_path}/model", "--scale", "1/16", "--layers", 2)
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "config.json").is_file()


def test_dry_run_writes_nothing(source: Path, memory: str) -> None:
    done = reshard("split", source, memory, "--tp", 4, "--dry-run")
    assert done.code == 0
    assert "nothing was written" in done.out
    assert objects("memory://") == {}


def test_what_stands_there_is_not_touched_unasked(source: Path, memory: str, other: Path) -> None:
    split(source, memory)
    before = objects(memory)
    for from_, options, message in (
        (source, {}, "holds a finished shard set"),
        (source, {"ranks": (0,), "overwrite": True}, "leave --ranks out"),
        (other, {"resume": True}, "of another source or of other options"),
    ):
        with pytest.raises(OutputError, match=message):
            split(from_, memory, **options)
    put(memory, "notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"memory://sets/tp4: holds notes\.txt, which is no part of a shard set"):
        split(source, memory, overwrite=True)
    assert objects(memory) == {**before, "notes.txt": b"mine"}


def test_the_address_of_a_file(source: Path, memory: str) -> None:
    put("memory://sets", "tp4", b"mine")
    with pytest.raises(OutputError, match="is a file"):
        split(source, memory)
    assert objects("memory://sets") == {"tp4": b"mine"}


def test_ranks_and_resume(source: Path, wanted: Files, memory: str) -> None:
    assert split(source, memory, ranks=(1, 2)).missing == (0, 3)
    assert objects(memory).keys() == with_records((1, 2))
    result = split(source, memory, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([1, 2], [0, 3])
    assert objects(memory) == wanted
    assert ranks_of(split(source, memory, resume=True).kept) == [0, 1, 2, 3]
    assert objects(memory) == wanted


def test_only_what_is_missing_or_differs_is_put_again(source: Path, wanted: Files, memory: str) -> None:
    split(source, memory, tp=8, ranks=range(5))
    eight = objects(memory)
    put(memory, shard(0, 8), b"short")
    put(memory, shard(1, 8), bytes(len(eight[shard(1, 8)])))  # the right size, and other bytes
    fsspec.filesystem("memory").rm_file(f"/sets/tp4/{record(2, 8)}")
    result = split(source, memory, tp=8, ranks=range(5), resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([3, 4], [0, 1, 2])
    assert objects(memory) == eight


# --- made here, then put ---


def test_too_little_space_for_the_shards_here(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    with pytest.raises(SpaceError, match=r"100,000 are free; .*name a folder on a larger disk with TMPDIR"):
        split(source, memory)
    assert objects(memory) == {}


def test_a_disk_that_gives_back_other_bytes(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DirectFile.commit

    def commit(file: DirectFile) -> None:
        data = bytearray(file.path.read_bytes())
        data[-1] ^= 1
        file.path.write_bytes(data)
        real(file)

    monkeypatch.setattr(DirectFile, "commit", commit)
    with pytest.raises(OutputError, match=r"safetensors: the disk gives back other bytes than were written to it"):
        split(source, memory)
    assert objects(memory) == {}


def publish_cancelled(
    target: RemoteTarget,
    entry: Shard,
    data: bytes,
    tick: Callable[[int], None],
    then: Callable[[], None] = lambda: None,
) -> None:
    with target.writing((0,)):
        file = target.create(entry.file)
        file.write(memoryview(data))
        file.close()
        with pytest.raises(Cancelled):
            target.publish(file, entry, tick)
        then()


def test_a_put_that_is_told_to_end(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that shows a file while it is written shows none that is not whole."""
    split(source, memory, ranks=(0,))
    target = RemoteTarget("memory://sets/other")
    (entry,) = split(source, memory, ranks=(0,), resume=True).kept
    monkeypatch.setattr(type(target._fs), "blocksize", 4096)
    put_so_far: list[int] = []

    def tick(nbytes: int) -> None:
        if nbytes == 0:  # of the put; what is read back has a size
            put_so_far.append(nbytes)
            if len(put_so_far) >= 3:
                raise Cancelled

    publish_cancelled(target, entry, objects(memory)[entry.file], tick)
    assert len(put_so_far) >= 3
    assert objects("memory://sets/other") == {}


def test_a_put_that_hangs_is_told_to_end(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that asks nobody is left behind."""
    split(source, memory, ranks=(0,))
    (entry,) = split(source, memory, ranks=(0,), resume=True).kept
    target, over = RemoteTarget("memory://sets/other"), threading.Event()
    monkeypatch.setattr(type(target._fs), "put_file", lambda *_, **__: over.wait(TIMEOUT_SECONDS))
    asked: list[int] = []

    def tick(nbytes: int) -> None:
        asked.append(nbytes)
        if nbytes == 0:
            raise Cancelled

    publish_cancelled(target, entry, objects(memory)[entry.file], tick, then=over.set)
    assert asked[-2:] == [0, 0], "before any bound of time"


def test_a_put_is_given_up_within_minutes() -> None:
    """Of a shard of DeepSeek-R1 for 8 ranks. That the bound is kept is the next test's."""
    assert limits.DRIVER_SECONDS + (280 << 20) / limits.PUT_SPEED == 310


@pytest.mark.parametrize(("silent", "seconds"), [("GET", 0.5), ("PUT", 3.5)])
def test_a_store_that_is_silent(
    source: Path, wanted: Files, monkeypatch: pytest.MonkeyPatch, silent: str, seconds: float
) -> None:
    """While it is asked what it holds, and while a shard is put, which takes longer by its size."""
    monkeypatch.setattr(limits, "DRIVER_SECONDS", 3.0 if silent == "PUT" else seconds)
    monkeypatch.setattr(limits, "PUT_SPEED", 2 * len(wanted[shard(0)]))

    def fault(handler: Handler, asked: Asked) -> bool:
        if asked.method == silent:
            handler.hub.over.wait(TIMEOUT_SECONDS)
        else:
            handler.answer(200, bucket_list({}))
        return True

    with serving(Hub({}, fault=fault)) as store:
        for name, value in environment(store.url).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        done = reshard("split", source, f"s3://bucket/{silent}", "--tp", 4, "--quiet", "--workers", 1)
    what, file = ("listed", "") if silent == "GET" else ("written", f"/{shard(0)}")
    assert done.code == 1, done.out + done.err
    said = rf"error: s3://bucket/{silent}{file}: cannot be {what}: 0 bytes in {seconds} s: too slow; see to the "
    assert re.fullmatch(f"{said}.*\n", done.err), done.err


def test_a_source_that_fails_midway(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: FolderSource, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        raise SourceError(f"{file}: the disk is failing")

    with open_source(str(source)) as opened:
        prepared = prepare(opened, Cut(4))
        monkeypatch.setattr(FolderSource, "read_rows", failing)
        with pytest.raises(SourceError, match="the disk is failing"):
            write_shards(prepared, memory, SplitOptions())
    assert objects(memory) == {}


# --- the order of things ---


class Steps:
    """Every call of a store, as (what, name); the one of number `fail_at` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.labels: list[tuple[str, str]] = []
        real = RemoteTarget._attempt

        def attempt(target: RemoteTarget, what: str, name: str, call: Any, *bounds: Any) -> Any:
            self.labels.append((what, name))
            if len(self.labels) - 1 == fail_at:

                def failing(path: str) -> None:
                    raise OSError("the network is down")

                return real(target, what, name, failing)
            return real(target, what, name, call, *bounds)

        monkeypatch.setattr(RemoteTarget, "_attempt", attempt)


def test_the_manifest_is_deleted_first_and_put_last(
    source: Path, memory: str, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(other, memory)
    with monkeypatch.context() as patch:
        steps = Steps(patch).labels
        split(source, memory, overwrite=True)
    first_shard = min(at for at, (what, name) in enumerate(steps) if what == "written" and name.startswith("denseffn"))
    assert steps.index(("written", ".manifest.json.replaced")) < steps.index(("deleted", "manifest.json")) < first_shard
    last = steps.index(("written", "manifest.json"))
    assert all(what != "written" for what, _ in steps[last + 1 :])
    for rank in range(4):
        assert steps.index(("written", shard(rank))) < steps.index(("written", record(rank))) < last
        assert last < steps.index(("deleted", record(rank)))


@pytest.mark.parametrize("before", [None, 2])
def test_refused_at_every_step(
    source: Path, wanted: Files, memory: str, other: Path, before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty place, and over another set; no half file stays, no false manifest, and --resume mends it."""
    fs = fsspec.filesystem("memory")
    number, options = 0, {"workers": 1, "overwrite": before is not None}
    while True:
        fs.store.clear()
        old: Files = {}
        if before:
            split(other, memory, before)
            old = objects(memory)
        with monkeypatch.context() as patch:
            steps = Steps(patch, number)
            failure = None
            try:
                split(source, memory, **options)
            except OutputError as error:
                failure = str(error)
        if failure is None:
            break
        assert "the network is down; see to the address" in failure, steps.labels[number]
        there = objects(memory)
        if "manifest.json" in there:
            whole = old if there["manifest.json"] == old.get("manifest.json") else wanted
            assert {name: there[name] for name in whole} == whole, f"{steps.labels[number]}: a false manifest"
        for name in there:
            if name.startswith("denseffn") and name.endswith(".safetensors"):
                assert there[name] in (old.get(name), wanted.get(name)), f"{steps.labels[number]}: half of {name}"
        again = {"overwrite": True} if old and there.get("manifest.json") == old["manifest.json"] else {"resume": True}
        split(source, memory, **again)
        assert objects(memory) == wanted, steps.labels[number]
        number += 1
    assert number > 20
    assert len(steps.labels) == number


# --- addresses ---


def test_a_password_in_the_address_is_refused_and_not_shown(source: Path) -> None:
    for address in (f"sftp://me:{SECRET}@host/sets", f"s3://{KEY}:{SECRET}@bucket/sets"):
        done = reshard("split", source, address, "--tp", 4)
        assert done.code == 2
        assert "holds a password" in done.err
        assert SECRET not in done.err + done.out


def test_addresses_that_are_none() -> None:
    for address, message in (
        ("nothing://a/b", "nothing://a/b: is no address that can be used: Protocol not known: nothing"),
        ("simplecache::memory://a", "is a chain of file systems"),
    ):
        with pytest.raises(UsageError, match=message):
            open_target(address)


def test_a_package_that_is_missing_is_named(source: Path) -> None:
    hidden = "import sys; sys.modules['s3fs'] = None"
    done = reshard_process("split", source, "s3://bucket/sets", "--tp", 4, before=hidden)
    assert done.code == 1
    assert done.err.startswith("error: s3:// needs s3fs, which cannot be imported (")
    assert done.err.endswith(": pip install s3fs\n")


def test_what_is_written_to_this_host_only(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder is made that is called as the address."""
    config = ROOT / "configs" / "deepseek-v2-lite.json"
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for writer, command in (
        ("merge", ("merge", finished, "s3://bucket/x")),
        ("synth", ("synth", config, "s3://bucket/x", "--scale", "1/16", "--layers", 2)),
        ("--svg", ("estimate", "--config", config, "--tp", 2, "--svg", "s3://bucket/x")),
    ):
        done = reshard(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"error: s3://bucket/x: {writer} writes to this host only; give a path here, and copy what is written\n"
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("spelling", ["memory://sets/tp4", "memory:///sets/tp4/", "memory://sets/tp4//"])
def test_out_is_the_source_however_it_is_spelt(source: Path, memory: str, spelling: str) -> None:
    split(source, memory)
    before = objects(memory)
    done = reshard("split", memory, spelling, "--tp", 2, "--overwrite")
    assert done.code == 1
    assert "is the source itself" in done.err
    assert objects(memory) == before


def test_one_place_or_two() -> None:
    assert same_place("s3://bucket/a", "s3a://bucket/a/")
    assert not same_place("s3://bucket/a", "s3://bucket/ab")
    assert not same_place("sftp://one/sets", "sftp://other/sets")
    assert not same_place("nothing://a", "memory://a")


# --- S3 ---


@pytest.fixture
def s3(s3_server_here: Server, request: pytest.FixtureRequest) -> str:
    """An empty address in the bucket."""
    return f"s3://{s3_server_here.bucket}/{request.node.name}/tp4"


def test_s3_by_the_command_tells_no_secret(source: Path, wanted: Files, s3: str, s3_server: Server) -> None:
    first = reshard_process("split", source, s3, "--tp", 4, "--ranks", "0-1", **s3_server.environment)
    assert first.code == 0, first.err
    assert objects(s3).keys() == with_records((0, 1))
    told = b"".join(objects(s3).values()) + (first.out + first.err).encode()
    second = reshard_process("split", source, s3, "--tp", 4, "--resume", "--debug", **s3_server.environment)
    assert second.code == 0, second.err
    assert second.out.count("(kept)") == 2
    told += b"".join(objects(s3).values()) + (second.out + second.err).encode()
    assert objects(s3) == wanted
    assert KEY.encode() not in told
    assert SECRET.encode() not in told


def test_s3_over_another_set_in_an_empty_folder_of_the_console(
    source: Path, wanted: Files, s3: str, other: Path
) -> None:
    """S3's console makes a folder as an empty object whose key ends with a slash."""
    fs, root = fsspec.url_to_fs(s3)
    bucket, _, key = root.partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=f"{key}/", Body=b"")
    split(other, s3, 2)
    split(source, s3, overwrite=True)
    assert objects(s3) == wanted


def test_s3_killed_in_the_middle(source: Path, wanted: Files, s3: str, s3_server: Server, temporary: Path) -> None:
    kill = f"""
import os, signal, tempfile
tempfile.tempdir = {str(temporary)!r}
import reshard.writer.remote as remote
real = remote.RemoteTarget.put
def put(target, name, data):
    if name == {record(1)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(target, name, data)
remote.RemoteTarget.put = put
"""
    command = ("split", source, s3, "--tp", 4, "--workers", 1)
    dead = reshard_process(*command, before=kill, **s3_server.environment)
    assert dead.code == -signal.SIGKILL, dead.err
    assert objects(s3).keys() == {shard(0), record(0), shard(1)}
    for left in temporary.iterdir():  # on its own host
        for path in left.iterdir():
            path.unlink()
        left.rmdir()
    done = reshard_process(*command, "--resume", **s3_server.environment)
    assert done.code == 0, done.err
    assert done.out.count("(kept)") == 1
    assert objects(s3) == wanted


@pytest.mark.parametrize(
    ("address", "changed", "message"),
    [
        ("s3://nowhere/sets", {}, "cannot be written: The specified bucket does not exist"),
        ("s3://bucket/none", {"AWS_ACCESS_KEY_ID": ""}, "s3://bucket/none: cannot be listed: Unable to locate cred"),
        ("s3://bucket/none", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://bucket/none: cannot be listed: "),
    ],
)
def test_s3_that_cannot_be_written(
    source: Path, s3_server: Server, address: str, changed: dict[str, str], message: str
) -> None:
    environment = {**s3_server.environment, "AWS_MAX_ATTEMPTS": "1", **changed}
    done = reshard_process("split", source, address, "--tp", 4, "--quiet", **environment)
    assert (done.code, done.out) == (1, ""), done.err
    assert done.err.startswith(f"error: {address}")
    assert message in done.err
    assert done.err.endswith("then run the same command with --resume\n")
    assert done.err.count("\n") == 1, done.err
    assert KEY not in done.err
    assert SECRET not in done.err


def test_s3_by_several_processes(source: Path, wanted: Files, s3: str) -> None:
    command = [source, s3, "--tp", 4]
    ended = processes(command, command, command)
    assert [done.code for done in ended] == [0, 0, 0], ended
    assert objects(s3) == wanted


def test_stores_that_are_not_shared(source: Path) -> None:
    """Each process has a memory of its own."""
    command = [source, "memory://sets", "--tp", 4]
    first, second = processes(command, command)
    assert (first.code, second.code) == (1, 1)
    assert f"has written {shard(2)}, and process 0 of 2" in first.err
