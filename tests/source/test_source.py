"""A folder as a source: what is read of it, and what happens when it cannot be."""

import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from reshard.errors import SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.address import HUBS, Hub
from reshard.source.base import Origin, Source
from reshard.source.folder import FolderSource
from reshard.tensors.memory import Bytes
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import RECIPES, Spec, allowed_bytes, build, dense_only, read_folder
from tests.support.paths import CONFIGS
from tests.support.running import reshard, reshard_process, same_but_for_the_origin, split


class Watched(FolderSource):
    """Remembers every byte range that is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.taken: list[tuple[str, int, int]] = []

    def read(self, file: str, start: int, stop: int) -> bytes:
        self.taken.append((file, start, stop))
        return super().read(file, start, stop)

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        self.taken.append((file, start, start + (len(out) - 1) * stride + out.shape[1]))
        super().read_rows(out, file, start, stride, once)

    def prefetch(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        self.taken += ranges


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_no_byte_of_another_tensor_is_asked_for(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    with Watched(tmp_path / "model") as source:
        write_shards(prepare(source, Cut(4)), tmp_path / "out", SplitOptions())
        allowed = allowed_bytes(tmp_path / "model")
        for file, start, stop in source.taken:
            assert allowed[file][start:stop].all(), (file, start, stop)
        covered = {file: np.zeros(len(mask), np.bool_) for file, mask in allowed.items()}
        for file, start, stop in source.taken:
            covered[file][start:stop] = True
        for file, mask in allowed.items():
            if file.endswith(".safetensors"):
                assert (covered[file] == mask).all(), f"{file}: not all of the DenseFFN was read"


def test_other_tensors_may_be_unreadable(tmp_path: Path) -> None:
    """Everything else turned into a hole: the shards are the same."""
    tensors = build(tmp_path / "model", Spec("fp8_block", files=1))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
    raw[~allowed_bytes(tmp_path / "model")[path.name]] = 0xA5
    path.write_bytes(raw.tobytes())
    assert dense_only(read_folder(tmp_path / "model")) == dense_only(tensors)
    split(tmp_path / "model", tmp_path / "out", Cut(2))
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "right")


def test_a_file_cut_short_meanwhile_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """What the kernel answers with SIGBUS at a first use."""
    path = tmp_path / "data"
    path.write_bytes(bytes(100_000))
    with FolderSource(tmp_path) as source:
        whole = np.ones((200, 250), np.uint8)  # in rows of the file
        columns = np.ones((50, 250), np.uint8)  # of each row of 1000 bytes a part
        source.read_rows(whole, "data", 0, 250)
        source.read_rows(columns, "data", 500, 1000)
        assert not whole.any()
        assert not columns.any()
        os.truncate(path, 8192)
        with pytest.raises(SourceError, match=r"data: ends at byte 8192, expected 50000; it was cut short"):
            source.read_rows(whole, "data", 0, 250)
        with pytest.raises(SourceError, match=r"data: ends at byte 8500, expected 8750; it was cut short"):
            source.read_rows(columns, "data", 500, 1000)


def test_a_file_that_shrank_since_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(1000))
    with FolderSource(tmp_path) as source:
        assert source.files()["data"] == 1000
        os.truncate(path, 10)
        with pytest.raises(SourceError, match="ends at byte 10, expected 1000"):
            source.read("data", 0, 1000)
        with pytest.raises(SourceError, match="ends at byte 10, expected 1000; it was cut short"):
            list(source.blocks("data", 0, 1000))


@pytest.mark.parametrize("allowed", [True, False], ids=["", "the kernel does not gather"])
def test_rows_are_the_files_bytes(allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a sandbox forbids the call that copies many rows at once."""
    if not allowed:
        monkeypatch.setattr("reshard.tensors.rows._LIBC.process_vm_writev", lambda *arguments: -1)
    data = np.frombuffer(os.urandom(70_000), np.uint8)
    (tmp_path / "data").write_bytes(data.tobytes())
    with FolderSource(tmp_path) as source:
        for start, stop in ((0, 1), (4095, 4097), (8192, 12288), (3, 69_999), (69_999, 70_000), (0, 70_000), (9, 9)):
            assert b"".join(block.tobytes() for block in source.blocks("data", start, stop)) == bytes(data[start:stop])
            assert source.read("data", start, stop) == bytes(data[start:stop])
        for rows, width, start, stride in ((3000, 7, 5, 23), (2, 5000, 1, 64_999), (1, 9, 0, 50), (40, 50, 0, 50)):
            wanted = np.lib.stride_tricks.as_strided(data[start:], (rows, width), (stride, 1))
            for memory in (np.empty((rows, width), np.uint8), np.empty((rows, width + 3), np.uint8)[:, 2:-1]):
                source.read_rows(memory, "data", start, stride)
                assert (memory == wanted).all()


def test_a_thread_that_reads_keeps_the_file_open(tmp_path: Path) -> None:
    """A descriptor that was closed under it might be another file's by then."""
    (tmp_path / "data").write_bytes(b"data")
    source = FolderSource(tmp_path)
    blocks = source.blocks("data", 0, 4)
    source.read("data", 0, 4)
    opened = weakref.ref(source._open("data"))
    reader = source._reader("data")
    source.close()
    assert opened() is not None
    out = np.empty((1, 4), np.uint8)
    reader.read(out, 0, 4)
    assert out.tobytes() == b"data"
    del reader, blocks
    assert opened() is None


def test_any_source_will_do(tmp_path: Path) -> None:
    """The plan and the writer know a source by its protocol alone."""

    class InMemory(Source):
        def __init__(self, folder: Path) -> None:
            self.origin = FolderSource(folder).origin
            self._held = {path.name: path.read_bytes() for path in folder.iterdir()}

        def files(self) -> dict[str, int]:
            return {name: len(data) for name, data in self._held.items()}

        def read(self, file: str, start: int, stop: int) -> bytes:
            return self._held[file][start:stop]

        def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
            for row in range(len(out)):
                at = start + row * stride
                out[row] = np.frombuffer(self._held[file], np.uint8)[at : at + out.shape[1]]

        def prefetch(self, ranges: Iterable[tuple[str, int, int]]) -> None: ...

    build(tmp_path / "model", Spec())
    source: Source = InMemory(tmp_path / "model")
    write_shards(prepare(source, Cut(2)), tmp_path / "out", SplitOptions())
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    for path in (tmp_path / "right").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_another_hub_is_a_module_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    build(model, Spec())

    class Files:
        folders = ()

        def __init__(self, repo: str, revision: str | None) -> None:
            self.origin = Origin("another", repo, revision)
            self.sizes = {path.name: path.stat().st_size for path in model.iterdir()}

        def fetch(self, file: str, start: int, stop: int) -> Iterator[bytes]:
            yield (model / file).read_bytes()[start:stop]

        def seconds(self, size: int) -> float:
            return 10.0

    module = ModuleType("another")
    monkeypatch.setattr(module, "find_repository", Files, raising=False)
    monkeypatch.setitem(sys.modules, "another", module)
    monkeypatch.setitem(HUBS, "an", Hub("another", "another", "1.0", "ANOTHER_ENDPOINT"))
    assert reshard("split", "an://org/model@v1", tmp_path / "out", "--tp", 2, "--quiet").code == 0
    split(model, tmp_path / "right", Cut(2))
    origin = {"kind": "another", "name": "org/model", "commit": "v1"}
    same_but_for_the_origin(origin, tmp_path / "out", tmp_path / "right")
    monkeypatch.setitem(sys.modules, "another", None)
    refused = reshard("inspect", "an://org/model")
    assert refused.code == 1
    assert "needs another>=1.0, which cannot be imported (installed is none; " in refused.err


@pytest.mark.slow
def test_a_sparse_r1_is_inspected_from_its_headers(tmp_path: Path) -> None:
    """163 files, 91,991 tensors, 688 GB of holes: what is read is the headers."""
    config = CONFIGS / "deepseek-r1.json"
    made = reshard("synth", config, tmp_path / "r1", "--scheme", "fp8_block", "--sparse", "--quiet")
    assert made.code == 0
    files = list((tmp_path / "r1").glob("*.safetensors"))
    assert len(files) == 163
    assert sum(path.stat().st_size for path in files) > 688e9
    assert sum(path.stat().st_blocks for path in files) * 512 < 100e6
    done = reshard_process("inspect", tmp_path / "r1", "--format", "json")
    assert done.code == 0
    document = done.document
    assert (document["total_tensors"], document["scheme"]) == (91_991, "fp8_block")
    assert [layer["index"] for layer in document["layers"]] == [0, 1, 2]
    assert document["part_bytes"] == 3 * 3 * (18432 * 7168 + 144 * 56 * 4)
    refused = reshard("split", tmp_path / "r1", tmp_path / "out", "--tp", 32)
    assert refused.code == 1
    assert "576 rows" in refused.err
