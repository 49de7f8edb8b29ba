"""Sets of several parts below one address: memory and a real S3 server, a plain server, an archive."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.builders import read_folder
from tests.support.hub_server import Hub, serving
from tests.support.part_models import Model, build
from tests.support.running import reshard, split_parts
from tests.support.s3 import Server
from tests.support.sets import no_fsync, snapshot  # noqa: F401

SIZES = {"denseffn": 2, "lm_head": 2, "o_proj": 4}
PARTS = [word for key, size in SIZES.items() for word in ("--part", f"{key}={size}")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and its sets in a folder."""
    folder = tmp_path_factory.mktemp("made")
    build(folder / "model", Model(computable=True))
    split_parts(folder / "model", folder / "sets", **SIZES)
    return folder


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://store/sets"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def s3(s3_server_here: Server) -> str:
    return f"s3://{s3_server_here.bucket}/store/sets"


def read(made: Path, address: str, tmp_path: Path) -> None:
    """Every command takes them."""
    done = reshard("verify", address, "--source", made / "model", "--quiet", "--format", "json")
    assert done.code == 0, done.out + done.err
    assert [part["part"] for part in done.document["parts"]] == list(SIZES)
    done = reshard("check", address, "--against", made / "model", "--format", "json")
    assert done.code == 0, done.out + done.err
    assert len(done.document["targets"]) == len(SIZES)
    assert reshard("inspect", address, "--format", "json").document["part"] == "denseffn"
    assert reshard("inspect", address, "--part", "o_proj", "--format", "json").document["shard_set"]["tp_size"] == 4
    done = reshard("inspect", address, "--part", "embedding")
    assert (done.code, done.err) == (
        2,
        f"error: {address}: holds sets of denseffn, lm_head, o_proj, none of embedding\n",
    )
    assert reshard("merge", address, tmp_path / "merged", "--quiet").code == 0
    assert reshard("merge", made / "sets", tmp_path / "merged here", "--quiet").code == 0
    assert read_folder(tmp_path / "merged") == read_folder(tmp_path / "merged here")
    options = ("--part", "o_proj=2", "--part", "lm_head=4", "--quiet")
    assert reshard("split", address, tmp_path / "again", *options).code == 0
    assert reshard("split", made / "sets", tmp_path / "again here", *options).code == 0
    for key in ("o_proj", "lm_head"):
        assert snapshot(tmp_path / "again" / key) == snapshot(tmp_path / "again here" / key)
    done = reshard("estimate", address, "--tp", "1,2", "--format", "json")
    assert done.code == 0, done.err
    assert len(done.document["schemes"]) == len(SIZES)


def written(made: Path, address: str) -> None:
    """The bytes of a folder's sets."""
    done = reshard("split", made / "model", f"{address}/", *PARTS, "--quiet", "--format", "json")
    assert done.code == 0, done.err
    assert [part["out"] for part in done.document["parts"]] == [f"{address}/{key}" for key in SIZES]
    fs, root = fsspec.url_to_fs(address)
    fs.invalidate_cache()
    for key in SIZES:
        objects = {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(f"{root}/{key}")}
        assert objects == snapshot(made / "sets" / key)


def missed(address: str) -> None:
    """A set that is taken away."""
    fs, root = fsspec.url_to_fs(address)
    fs.rm(f"{root}/o_proj", recursive=True)
    done = reshard("verify", address, "--quiet")
    assert done.code == 1
    assert f"error: {address}: lacks o_proj, cut together with lm_head (its manifest.json says so)" in done.err


def test_written_and_read(made: Path, memory: str, tmp_path: Path) -> None:
    address = memory
    written(made, address)
    read(made, address, tmp_path)
    done = reshard("split", made / "model", address, *PARTS, "--quiet")
    assert done.code == 1
    assert f"error: {address}/denseffn: holds a finished shard set" in done.err
    done = reshard("split", made / "model", address, "--part", "lm_head=2", "--quiet")
    assert done.code == 1
    assert f"error: {address}: holds denseffn, which is no part of a shard set; choose an empty folder" in done.err
    done = reshard("split", made / "model", f"{address}/lm_head", *PARTS, "--quiet")
    assert done.code == 1
    assert f"error: {address}/lm_head: holds a shard set; several parts go into a folder without one" in done.err
    missed(address)
    assert reshard("check", address).code == 3


def test_s3(made: Path, s3: str) -> None:
    written(made, s3)
    done = reshard("verify", s3, "--quiet", "--format", "json")
    assert done.code == 0, done.out + done.err
    assert [part["part"] for part in done.document["parts"]] == list(SIZES)
    missed(s3)


def test_a_plain_server(made: Path, tmp_path: Path) -> None:
    folders = {"sets": made / "sets", **{f"sets/{key}": made / "sets" / key for key in SIZES}}
    with serving(Hub(folders)) as hub:
        read(made, hub.page, tmp_path)


def test_an_archive(made: Path, memory: str, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "sets"), "zip", made / "sets")
    MemoryFileSystem().pipe_file("/store/sets.zip", (tmp_path / "sets.zip").read_bytes())
    read(made, f"zip://::{memory}.zip", tmp_path)
