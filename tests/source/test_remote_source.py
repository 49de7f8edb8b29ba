"""Folders on other file systems, by fsspec: memory, and a real S3 server."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from reshard import limits
from reshard.errors import SourceError, SpaceError, UsageError
from reshard.plan.pipeline import Cut, prepare
from reshard.safe_text import redacted
from reshard.source import web
from reshard.source.address import last_part
from reshard.source.open import describe, open_source
from reshard.source.range_cache import Stage
from reshard.source.retry import Fault, RetryPolicy
from reshard.tensors.rows import RowReader
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, build
from tests.support.running import Done, reshard, reshard_process, same_but_for_the_origin, split
from tests.support.s3 import KEY, SECRET, Server


def upload(folder: Path, address: str, **options: Any) -> None:
    fs, path = fsspec.url_to_fs(address, **options)
    for file in folder.iterdir():
        fs.pipe_file(f"{path}/{file.name}", file.read_bytes())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint at memory://store/model; its set at memory://store/right and in the folder `right`."""
    build(tmp_path / "model", Spec("modelslim_dynamic", computable=True))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    upload(tmp_path / "model", "memory://store/model")
    upload(tmp_path / "right", "memory://store/right")
    yield tmp_path
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_every_command_takes_an_address(memory: Path) -> None:
    seen = reshard("inspect", "memory://store/model", "--format", "json")
    assert seen.document["source"] == {"kind": "remote", "name": "model", "commit": None}
    assert reshard("split", "memory://store/model", memory / "out", "--tp", 2, "--quiet").code == 0
    same_but_for_the_origin({"kind": "remote"}, memory / "out", memory / "right")
    checked = reshard("verify", memory / "out", "--source", "memory://store/model", "--quiet")
    assert checked.code == 0, checked.out + checked.err


def test_a_shard_set_is_a_source(memory: Path) -> None:
    assert reshard("inspect", "memory://store/right", "--format", "json").document["shard_set"]["tp_size"] == 2
    assert reshard("verify", "memory://store/right", "--source", memory / "model", "--quiet").code == 0
    assert reshard("merge", "memory://store/right", memory / "merged", "--quiet").code == 0
    assert reshard("split", "memory://store/right", memory / "tp4", "--tp", 4, "--quiet").code == 0
    reshard("merge", memory / "right", memory / "merged-right", "--quiet")
    split(memory / "model", memory / "tp4-right", Cut(4))
    for made, right in (("merged", "merged-right"), ("tp4", "tp4-right")):
        for path in (memory / right).iterdir():
            assert (memory / made / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_damaged_set_is_found(memory: Path) -> None:
    path = "/store/right/denseffn-rank-00001-of-00002.safetensors"
    data = bytearray(MemoryFileSystem.store[path].getvalue())
    data[-1] ^= 1
    MemoryFileSystem().pipe_file(path, bytes(data))
    assert reshard("verify", "memory://store/right", "--quiet").code == 3
    refused = reshard("split", "memory://store/right", memory / "out", "--tp", 1, "--quiet")
    assert refused.code == 1
    assert "BLAKE3 is" in refused.err


def test_this_host_s_files_are_a_folder(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    seen = reshard("inspect", f"file://{tmp_path / 'model'}", "--format", "json")
    assert seen.document["source"] == {"kind": "folder", "name": "model", "commit": None}


def test_an_archive_is_read_through_another_file_system(memory: Path) -> None:
    import shutil

    shutil.make_archive(str(memory / "packed"), "zip", memory / "model")
    MemoryFileSystem().pipe_file("/store/packed.zip", (memory / "packed.zip").read_bytes())
    with open_source("zip://::memory://store/packed.zip") as source:
        write_shards(prepare(source, Cut(2)), memory / "out", SplitOptions())
    assert [p.read_bytes() for p in sorted((memory / "out").glob("*.safetensors"))] == [
        p.read_bytes() for p in sorted((memory / "right").glob("*.safetensors"))
    ]


@dataclass
class Faults:
    """What reads of `memory://` are to meet: errors, the last one first; then answers that lack bytes at their end."""

    errors: list[Exception]
    short: int = 0


@pytest.fixture
def faults(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults, real = Faults([]), MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        if faults.errors:
            raise faults.errors.pop()
        data: bytes = real(self, path, start=start, end=end)
        return data[: len(data) - faults.short]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return faults


def test_faults_that_pass(faults: Faults, memory: Path) -> None:
    faults.errors = [ConnectionResetError("reset"), TimeoutError(), RuntimeError("a package's own error")]
    waits: list[float] = []
    with open_source("memory://store/model", policy=RetryPolicy(sleep=waits.append)) as source:
        write_shards(prepare(source, Cut(2)), memory / "out", SplitOptions())
    same_but_for_the_origin({"kind": "remote"}, memory / "out", memory / "right")
    assert len(waits) == 3


def test_faults_that_stay(faults: Faults) -> None:
    def said() -> str:
        with open_source("memory://store/model", policy=RetryPolicy(sleep=lambda seconds: None)) as source:
            with pytest.raises(SourceError) as raised:
                describe(source)
            return str(raised.value)

    faults.errors = [PermissionError("not yours")]
    assert "cannot be read: PermissionError: not yours" in said()
    faults.errors = [TimeoutError() for _ in range(100)]
    assert "TimeoutError; given up after 6 tries" in said()
    faults.errors, faults.short = [], 1
    assert re.search(r"the answer ends at byte \d+, expected \d+; given up", said())


def test_a_file_that_changes_is_not_mixed(memory: Path) -> None:
    with open_source("memory://store/model") as source:
        prepared = prepare(source, Cut(2))
        build(memory / "other", Spec("modelslim_dynamic", seed=1, computable=True))
        upload(memory / "other", "memory://store/model")
        with pytest.raises(SourceError, match="has changed since it was first read; start again"):
            write_shards(prepared, memory / "out", SplitOptions())
    assert not (memory / "out").exists()


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("..", 1, r"lists '\.\.', which is no file's name"),
        ("a\nb", 1, "which is no file's name"),
        ("a\\b", 1, "which is no file's name"),
        ("x\ud800", 1, "which is no file's name"),
        ("x" * 1_000_000, 1, "lists 'xxxxxxxxxxxx...xxxxxxxxxxxxx', which is no file's name"),
        ("x", -1, "x: its size is said to be -1, expected bytes"),
        ("x", "12", "x: its size is said to be '12', expected bytes"),
        ("x", True, "x: its size is said to be True, expected bytes"),
        ("x", 10**30, "x: its size is said to be 10+, expected bytes"),
        ("below/config.json", 1, r"lists config\.json twice"),
    ],
)
def test_a_listing_is_checked_where_it_comes_in(
    memory: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: object, said: str
) -> None:
    real = MemoryFileSystem.ls
    entry = {"name": f"/store/model/{name}", "size": size, "type": "file"}
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, **how: [*real(self, path, **how), entry])
    done = reshard("inspect", "memory://store/model")
    assert done.code == 1
    assert re.fullmatch(f"error: memory://store/model: .*{said}.*\n", done.err)


def test_a_driver_whose_list_fills_the_memory_is_left_behind(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def endless(*arguments: object, **how: object) -> list[object]:
        held: list[bytes] = []
        while not over.wait(0.001) and len(held) < 1000:
            held.append(b"x" * (1 << 20))
        return []

    monkeypatch.setattr(MemoryFileSystem, "ls", endless)
    monkeypatch.setattr(limits, "LISTING_MEMORY", 64 << 20)
    done = reshard("inspect", "memory://store/model")
    over.set()
    assert done.code == 1
    assert done.err == "error: memory://store/model: its list takes more than 64 MiB; give a checkpoint's own folder\n"


@pytest.mark.parametrize("silent", ["ls", "cat_file"])
def test_a_driver_that_is_silent_is_left_behind(memory: Path, monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    over = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, silent, lambda *arguments, **how: over.wait())
    for name, seconds in (("LISTING_SECONDS", 0.1), ("DRIVER_SECONDS", 0.1), ("WHOLE_PIECE_SPEED", 1 << 40)):
        monkeypatch.setattr(limits, name, seconds)
    policy = RetryPolicy(sleep=lambda seconds: None)
    with pytest.raises(SourceError, match=r"0 bytes in 0\.1 s: too slow; given up after 3 tries"):
        describe(open_source("memory://store/model", policy=policy))
    over.set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "zip://::memory://store/model/config.json"), "error: zip://.*: File is not a zip file"),
        (
            ("inspect", "zip://::http://127.0.0.1:9/model.zip"),
            "error: zip://.*: an archive on a plain HTTP server is not",
        ),
        (("split", "memory://store/model", "https://host/out", "--tp", 2), "a plain HTTP server is read, not written"),
    ],
)
def test_addresses_that_are_not_read_or_written(memory: Path, arguments: tuple[object, ...], said: str) -> None:
    done = reshard(*arguments)
    assert done.code == 2
    assert re.search(said, done.err)
    assert done.err.count("\n") == 1


def test_what_is_not_there(memory: Path) -> None:
    for address, said in (
        ("memory://store/nothing", "nothing: no such folder at that address"),
        ("memory://store/model/config.json", "config.json: no files at that address"),
    ):
        with pytest.raises(SourceError, match=said):
            open_source(address)


def test_a_package_that_is_missing_is_named() -> None:
    hidden = "import sys; sys.modules['s3fs'] = None; sys.modules['gcsfs'] = None"
    for address, package in (("s3://bucket/model", "s3fs"), ("gs://bucket/model", "gcsfs")):
        done = reshard_process("inspect", address, before=hidden)
        assert done.code == 1
        assert done.err.endswith(f": pip install {package}\n")
        assert done.err.count("\n") == 1
    with pytest.raises(UsageError, match="Protocol not known"):
        open_source("nonsense://bucket/model")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("s3://bucket/models/r1/", "r1"),
        ("s3://bucket", "s3"),
        ("s3://bucket/", "s3"),
        ("s3://bucket/r1@v2", "r1@v2"),
        ("hdfs:///models/r1", "r1"),
        ("ftp://user:pass@word@host/models/r1", "r1"),
        ("https://user:password@host", "https"),
        ("https://host/r1?X-Amz-Signature=abc/def", "r1"),
        ("zip://::s3://bucket/r1.zip", "zip"),
        ("zip://inner/r1::s3://bucket/r1.zip", "r1"),
    ],
)
def test_names_hold_no_credentials_hosts_and_buckets(address: str, name: str) -> None:
    assert last_part(address) == name


def test_messages_hold_no_credentials() -> None:
    said = redacted("Cannot open https://user:pass@host/r1?X-Amz-Signature=abc&y=1, nor 's3://k:s@b/c'")
    assert said == "Cannot open https://host/r1 nor 's3://b/c'"
    assert redacted("ftp://user:pass@word@host/r1 is away: me@home") == "ftp://host/r1 is away: me@home"
    with pytest.raises(Fault) as raised:
        web.find_folder("http://user:password@127.0.0.1:9/r1?token=abc")
    assert "password" not in str(raised.value)
    assert "abc" not in str(raised.value)


def test_a_stage_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"data")
    said = r"the disk is full .*; let TMPDIR name a folder with more room"
    with (
        (tmp_path / "mapped").open("rb") as mapped,
        Path("/dev/full").open("r+b", buffering=0) as full,
        pytest.raises(SpaceError, match=said),
    ):
        Stage(full, RowReader(mapped, "mapped")).write(0, b"data")


# --- S3 ---


@pytest.mark.slow
def test_a_real_s3_server(s3_server: Server, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block"))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    options = {"key": KEY, "secret": SECRET, "endpoint_url": s3_server.environment["AWS_ENDPOINT_URL"]}

    def run(*arguments: object) -> Done:
        return reshard_process(*arguments, **s3_server.environment)

    upload(tmp_path / "model", "s3://bucket/models/model", **options)
    upload(tmp_path / "right", "s3://bucket/models/right", **options)
    done = run("split", "s3://bucket/models/model", tmp_path / "out", "--tp", 2, "--quiet")
    assert done.code == 0, done.err
    same_but_for_the_origin({"kind": "remote"}, tmp_path / "out", tmp_path / "right")
    assert KEY not in (tmp_path / "out" / "manifest.json").read_text()
    done = run("verify", "s3://bucket/models/right", "--source", "s3://bucket/models/model", "--quiet")
    assert done.code == 0, done.out + done.err
    done = run("split", "s3://bucket/models/right", tmp_path / "tp1", "--tp", 1, "--quiet")
    assert done.code == 0, done.err
    for address in ("s3://bucket/models/nothing", "s3://none/model"):
        done = run("inspect", address)
        assert done.code == 1
        assert "no such folder at that address" in done.err
        assert done.err.count("\n") == 1
