"""Shard sets in object stores: the bytes of a folder's, the manifest as commit, faults in the middle.

memory:// has every rule that S3 has; S3 itself is moto's server, by the real client.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from reshard.errors import OutputError, SourceError, UsageError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.filesystems import same_place
from reshard.source.folder import FolderSource
from reshard.source.open import open_source
from reshard.writer import remote
from reshard.writer.open import open_target
from reshard.writer.remote import RemoteTarget
from reshard.writer.split import SplitOptions, SplitResult, write_shards
from reshard.writer.team import Alone
from tests.support.builders import Spec, build
from tests.support.faults import ROOT
from tests.support.forks import reshard as reshard_process
from tests.support.running import reshard
from tests.support.s3 import KEY, SECRET, Server
from tests.support.teams import processes
from tests.writer.test_split_bytes import snapshot
from tests.writer.test_writer import ranks_of, record, shard

SPEC = Spec("modelslim_v0_static", dense=1)
Files = dict[str, bytes]


def split(source: Path, out: Path | str, tp: int = 4, **options: Any) -> SplitResult:
    tick = options.pop("tick", lambda nbytes: None)
    with open_source(str(source)) as opened:
        return write_shards(prepare(opened, Cut(tp)), out, SplitOptions(**{"workers": 2, **options}), tick)


def objects(address: str) -> Files:
    """Everything below an address."""
    fs, root = fsspec.url_to_fs(address)
    fs.invalidate_cache()
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(root)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "source"
    build(folder, SPEC)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The set of four, in a folder."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    split(source, out)
    return snapshot(out)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A source of the same shapes and other bytes."""
    build(tmp_path / "other" / "source", Spec(**{**vars(SPEC), "seed": 5}))
    return tmp_path / "other" / "source"


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty address."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://sets/tp4"
    fs.store.clear()


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
    fsspec.filesystem("memory").pipe_file("/sets/tp4/notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"memory://sets/tp4: holds notes\.txt, which is no part of a shard set"):
        split(source, memory, overwrite=True)
    assert objects(memory) == {**before, "notes.txt": b"mine"}


def test_the_address_of_a_file(source: Path, memory: str) -> None:
    fsspec.filesystem("memory").pipe_file("/sets/tp4", b"mine")
    with pytest.raises(OutputError, match="is a file"):
        split(source, memory)
    assert objects("memory://sets") == {"tp4": b"mine"}


def test_ranks_and_resume(source: Path, wanted: Files, memory: str) -> None:
    assert split(source, memory, ranks=(1, 2)).missing == (0, 3)
    assert objects(memory).keys() == {name for rank in (1, 2) for name in (shard(rank), record(rank))}
    result = split(source, memory, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([1, 2], [0, 3])
    assert objects(memory) == wanted
    assert ranks_of(split(source, memory, resume=True).kept) == [0, 1, 2, 3]
    assert objects(memory) == wanted


def test_a_shard_of_another_size_or_without_a_record_is_written_again(source: Path, wanted: Files, memory: str) -> None:
    split(source, memory, ranks=(0, 1, 2))
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/sets/tp4/{shard(0)}", b"short")
    fs.rm_file(f"/sets/tp4/{record(1)}")
    result = split(source, memory, resume=True)
    assert ranks_of(result.kept) == [2]
    assert objects(memory) == wanted


def test_a_record_of_another_set_vouches_for_nothing(
    source: Path, wanted: Files, memory: str, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no ETag tells whose a shard is: another source's takes its place, and the run ends before its record."""
    split(source, memory, ranks=(0,))
    put = RemoteTarget.put

    def failing(target: RemoteTarget, name: str, data: bytes) -> None:
        if name == record(0):
            raise OutputError("the network is down")
        put(target, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteTarget, "put", failing)
        with pytest.raises(OutputError, match="the network is down"):
            split(other, memory, ranks=(0,), overwrite=True)
    assert objects(memory)[shard(0)] != wanted[shard(0)]
    assert ranks_of(split(source, memory, resume=True).kept) == []
    assert objects(memory) == wanted


# --- the order of things ---


class Steps:
    """Every call of a store, as (what, name); the one of number `fail_at` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.labels: list[tuple[str, str]] = []
        real = RemoteTarget.attempt

        def attempt(target: RemoteTarget, what: str, name: str, call: Any) -> Any:
            self.labels.append((what, name))
            if len(self.labels) - 1 == fail_at:

                def failing() -> None:
                    raise OSError("the network is down")

                return real(target, what, name, failing)
            return real(target, what, name, call)

        monkeypatch.setattr(RemoteTarget, "attempt", attempt)


def test_the_manifest_is_deleted_first_and_put_last(
    source: Path, memory: str, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(other, memory)
    with monkeypatch.context() as patch:
        steps = Steps(patch).labels
        split(source, memory, overwrite=True)
    first_shard = min(at for at, (what, name) in enumerate(steps) if what == "written" and name == shard(0))
    assert steps.index(("deleted", "manifest.json")) < first_shard
    assert steps.index(("written", ".manifest.json.replaced")) < steps.index(("deleted", "manifest.json"))
    put = steps.index(("written", "manifest.json"))
    assert all(what != "written" for what, _ in steps[put + 1 :])
    assert all(
        steps.index(("written", record(rank))) < put < steps.index(("deleted", record(rank))) for rank in range(4)
    )


@pytest.mark.parametrize("before", [None, 2, 4])
def test_refused_at_every_step(
    source: Path, wanted: Files, memory: str, other: Path, before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty place, and over other sets; no half file stays, no false manifest, and --resume mends it."""
    monkeypatch.setattr("reshard.writer.stream.STAGE_BYTES", 65536)
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


def test_a_source_that_fails_midway(source: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(str(source)) as opened:
        prepared = prepare(opened, Cut(4))
        monkeypatch.setattr(FolderSource, "view", _failing)
        with pytest.raises(SourceError, match="the disk is failing"):
            write_shards(prepared, memory, SplitOptions())
    assert objects(memory) == {}


def _failing(self: FolderSource, file: str, start: int, stop: int) -> Any:
    raise SourceError(f"{file}: the disk is failing")


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
    done = reshard_process(
        "split", source, "s3://bucket/sets", "--tp", 4, before="import sys; sys.modules['s3fs'] = None"
    )
    assert done.code == 1
    assert done.err.startswith("error: s3://: needs s3fs, which cannot be imported (")
    assert done.err.endswith("; pip install 'reshard[s3]'\n")


def test_what_is_written_to_this_host_only(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder is made that is called as the address."""
    split(source, tmp_path / "set")
    config = ROOT / "configs" / "deepseek-v2-lite.json"
    monkeypatch.chdir(tmp_path)
    for writer, command in (
        ("merge", ("merge", "set", "s3://bucket/x")),
        ("synth", ("synth", config, "s3://bucket/x", "--scale", "1/16", "--layers", 2)),
        ("--svg", ("estimate", "--config", config, "--tp", 2, "--svg", "s3://bucket/x")),
    ):
        done = reshard(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err == (
            f"error: s3://bucket/x: {writer} writes to this host only; give a path here, and copy what is written\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_synth_takes_a_file_address(tmp_path: Path) -> None:
    config = ROOT / "configs" / "deepseek-v2-lite.json"
    done = reshard("synth", config, f"file://{tmp_path}/model", "--scale", "1/16", "--layers", 2)
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "config.json").is_file()


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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An empty address in the bucket."""
    _use(server, monkeypatch)
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}/tp4"


def _use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


def unfinished(address: str) -> list[str]:
    """The keys of uploads that were begun and neither completed nor aborted."""
    fs, root = fsspec.url_to_fs(address)
    found = fs.call_s3("list_multipart_uploads", Bucket=root.partition("/")[0], Prefix=root.partition("/")[2])
    return [upload["Key"].rpartition("/")[2] for upload in found.get("Uploads", [])]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose two shards are of 12.6 MB: three parts of 5 MiB."""
    folder = tmp_path_factory.mktemp("large") / "source"
    build(folder, Spec("fp32", hidden=1024, intermediate=2048, dense=1))
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)


SMALL_PARTS = "import reshard.writer.remote as remote; remote.PART_BYTES = 5 << 20\n"


@pytest.mark.usefixtures("small_parts")
def test_s3_in_parts(tmp_path: Path, large: Path, s3: str) -> None:
    split(large, tmp_path / "out", 2)
    split(large, s3, 2)
    assert objects(s3) == snapshot(tmp_path / "out")
    fs, root = fsspec.url_to_fs(s3)
    assert [fs.info(f"{root}/{shard(rank, 2)}")["ETag"].strip('"')[-2:] for rank in (0, 1)] == ["-3", "-3"]
    assert unfinished(s3) == []


def test_s3_by_the_command_tells_no_secret(source: Path, wanted: Files, s3: str, server: Server) -> None:
    first = reshard_process("split", source, s3, "--tp", 4, "--ranks", "0-1", **server.environment)
    assert first.code == 0, first.err
    assert objects(s3).keys() == {shard(0), record(0), shard(1), record(1)}
    told = b"".join(objects(s3).values()) + (first.out + first.err).encode()
    second = reshard_process("split", source, s3, "--tp", 4, "--resume", "--debug", **server.environment)
    assert second.code == 0, second.err
    assert second.out.count("(kept)") == 2
    told += b"".join(objects(s3).values()) + (second.out + second.err).encode()
    assert objects(s3) == wanted
    assert KEY.encode() not in told
    assert SECRET.encode() not in told


def test_s3_a_shard_with_another_etag_is_written_again(source: Path, wanted: Files, s3: str) -> None:
    """Of the right size, by somebody else, after its record: only the store's own account tells."""
    split(source, s3, ranks=(0, 1))
    fs, root = fsspec.url_to_fs(s3)
    fs.pipe_file(f"{root}/{shard(1)}", bytes(len(wanted[shard(1)])))
    result = split(source, s3, resume=True)
    assert ranks_of(result.kept) == [0]
    assert objects(s3) == wanted


def test_s3_an_empty_folder_of_the_console(source: Path, wanted: Files, s3: str) -> None:
    """S3's console makes a folder as an empty object whose key ends with a slash."""
    fs, root = fsspec.url_to_fs(s3)
    bucket, _, key = root.partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=f"{key}/", Body=b"")
    split(source, s3)
    assert {name: data for name, data in objects(s3).items() if name} == wanted


class Meddling(Alone):
    """A team of one; when its shards are written, something happens before the manifest."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__()
        self._happens = happens

    def exchange(self, value: Any) -> list[Any]:
        if isinstance(value, tuple) and value and isinstance(value[0], list):
            self._happens()
        return [value]


def test_s3_another_run_that_writes_there_is_seen(source: Path, wanted: Files, s3: str) -> None:
    """No manifest names a shard that is somebody else's."""
    fs, root = fsspec.url_to_fs(s3)
    foreign = bytes(len(wanted[shard(1)]))
    team = Meddling(lambda: fs.pipe_file(f"{root}/{shard(1)}", foreign))
    with open_source(str(source)) as opened, pytest.raises(OutputError, match=r"another run writes to this place"):
        write_shards(prepare(opened, Cut(4)), s3, SplitOptions(), team=team)
    assert "manifest.json" not in objects(s3)
    result = split(source, s3, resume=True)
    assert ranks_of(result.written) == [1]
    assert objects(s3) == wanted


def test_s3_overwriting_another_size(source: Path, wanted: Files, s3: str, other: Path) -> None:
    split(other, s3, 2)
    split(source, s3, overwrite=True)
    assert objects(s3) == wanted


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("error", [SourceError, KeyboardInterrupt])
def test_s3_uploads_are_aborted(large: Path, s3: str, error: type[BaseException]) -> None:
    def fail(nbytes: int) -> None:
        done.append(nbytes)
        if sum(done) > 11 << 20:
            raise error("in the middle")

    done: list[int] = []
    with pytest.raises(error):
        split(large, s3, 2, tick=fail, workers=1)
    assert unfinished(s3) == []
    assert objects(s3) == {}


def test_s3_killed_in_the_middle(tmp_path: Path, large: Path, s3: str, server: Server) -> None:
    """What it left is invisible; the next run of these ranks aborts it."""
    kill = f"""{SMALL_PARTS}
import os, signal
real = remote.Upload.write
def write(upload, data):
    real(upload, data)
    if upload.size > 11 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
remote.Upload.write = write
"""
    command = ("split", large, s3, "--tp", 2, "--workers", 1)
    dead = reshard_process(*command, before=kill, **server.environment)
    assert dead.code == -signal.SIGKILL, dead.err
    assert objects(s3) == {}
    assert unfinished(s3) == [shard(0, 2)]
    done = reshard_process(*command, "--ranks", "1", before=SMALL_PARTS, **server.environment)
    assert done.code == 0, done.err
    assert unfinished(s3) == [shard(0, 2)], "another rank's upload may be going on"
    done = reshard_process(*command, "--resume", before=SMALL_PARTS, **server.environment)
    assert done.code == 0, done.err
    assert unfinished(s3) == []
    split(large, tmp_path / "out", 2)
    assert objects(s3) == snapshot(tmp_path / "out")


@pytest.mark.usefixtures("small_parts")
def test_s3_whose_server_dies(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    _use(server, monkeypatch)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # how often the driver asks a dead server again is its own matter
    done: list[int] = []

    def tick(nbytes: int) -> None:
        done.append(nbytes)
        if sum(done) > 6 << 20:
            server.stop()

    try:
        with pytest.raises(OutputError) as caught:
            split(large, "s3://bucket/sets", 2, tick=tick, workers=1)
    finally:
        server.stop()
    assert str(caught.value).startswith(f"s3://bucket/sets/{shard(0, 2)}: cannot be written: ")
    assert str(caught.value).endswith("then run the same command with --resume")
    assert sum(done) > 6 << 20


@pytest.mark.parametrize(
    ("address", "changed", "message"),
    [
        ("s3://nowhere/sets", {}, "cannot be written: The specified bucket does not exist"),
        ("s3://bucket/none", {"AWS_ACCESS_KEY_ID": None}, "s3://bucket/none: cannot be listed: Unable to locate cred"),
    ],
)
def test_s3_that_cannot_be_written(
    source: Path, server: Server, address: str, changed: dict[str, str | None], message: str
) -> None:
    environment = {**server.environment, **{name: value or "" for name, value in changed.items()}}
    done = reshard_process("split", source, address, "--tp", 4, "--quiet", **environment)
    assert (done.code, done.out) == (1, ""), done.err
    assert done.err.startswith(f"error: {address}")
    assert message in done.err
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
