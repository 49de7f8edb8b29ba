"""A file that becomes another one while it is read: the bytes are of one file, and nothing that was made is kept."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reshard.errors import ReshardError, ShardError, SourceError
from reshard.manifest import parse_manifest
from reshard.model.naming import shard_file
from reshard.plan.pipeline import Cut, prepare
from reshard.regular import Opened
from reshard.source.base import read_header
from reshard.source.folder import FolderSource
from reshard.source.shardset import read_shard_set
from reshard.tensors.memory import Bytes
from reshard.writer.merge import merge
from reshard.writer.split import SplitOptions, write_shards
from reshard_runtime.loader import load_shard
from reshard_runtime.serving.vllm.other_weights import read_others
from tests.support.builders import Spec, build, write_safetensors
from tests.support.running import reshard, split
from tests.support.sets import snapshot

SPEC = Spec(files=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", SPEC)
    return tmp_path / "model"


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def other_order(path: Path) -> Path:
    """A file beside it with the same tensors, in the same size, in another order: one's header misreads the other."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries, at, body = json.loads(raw[8:start]), 0, b""
    header: dict[str, object] = {key: entries.pop(key) for key in ("__metadata__",) if key in entries}
    for name, entry in reversed(entries.items()):
        first, last = entry["data_offsets"]
        header[name] = entry | {"data_offsets": [at, at + last - first]}
        at, body = at + last - first, body + raw[start + first : start + last]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    other = path.with_name("other")
    other.write_bytes(raw[:8] + text + body)
    assert other.stat().st_size == path.stat().st_size
    assert other.read_bytes() != raw
    return other


def replaced(path: Path) -> None:
    other_order(path).replace(path)


def written_over(path: Path) -> None:
    """In place, as cp does it: the same inode."""
    other = other_order(path)
    path.write_bytes(other.read_bytes())
    other.unlink()
    os.utime(path, ns=(1, 1))


def taken_away(path: Path) -> None:
    path.unlink()


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "replaced": (replaced, "was replaced by another file while it was read"),
    "written over": (written_over, "was written to while it was read"),
    "taken away": (taken_away, "was taken away while it was read"),
}
each_change = pytest.mark.parametrize("case", list(CHANGES))


class Interrupted(FolderSource):
    """Something happens when weights are read for the n-th time."""

    def __init__(self, path: Path, at: int, change: Callable[[], None]) -> None:
        super().__init__(path)
        self.views = 0
        self._at, self._change = at, change

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        if file.endswith(".safetensors"):
            self.views += 1
            if self.views == self._at:
                self._change()
        super().read_rows(out, file, start, stride, once)


@each_change
@pytest.mark.parametrize("at", [1, 20])
def test_split_keeps_nothing_of_it(case: str, at: int, model: Path, tmp_path: Path) -> None:
    """At the first view: between the header and all of the data. Later: within it."""
    change, said = CHANGES[case]
    with Interrupted(model, at, lambda: change(file_of(model))) as source, pytest.raises(SourceError) as caught:
        write_shards(prepare(source, Cut(2)), tmp_path / "out", SplitOptions(workers=1))
    assert source.views >= at
    assert f"model-00001-of-00001.safetensors: {said}" in str(caught.value)
    assert "start again" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_split_is_of_the_file_that_was_opened_first(model: Path, tmp_path: Path) -> None:
    """Another file has the name when its data is first wanted; the one that was opened has it again at the end."""
    split(model, tmp_path / "right", Cut(2))
    other = model / "other"

    def put() -> None:
        other_order(file_of(model))
        os.link(file_of(model), model / "kept")
        other.replace(model / "model-00001-of-00001.safetensors")

    with Interrupted(model, 1, put) as source:
        prepared = prepare(source, Cut(2))
        (model / "kept").replace(model / "model-00001-of-00001.safetensors")
        write_shards(prepared, tmp_path / "out", SplitOptions())
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "right")


@each_change
def test_a_change_before_the_manifest_leaves_none(case: str, model: Path, tmp_path: Path) -> None:
    """The last rank's shard is durable, the manifest is not there yet."""
    change, said = CHANGES[case]
    split(model, tmp_path / "out", Cut(2), SplitOptions(ranks=(0,)))
    with FolderSource(model) as source:
        prepared = prepare(source, Cut(2))
        change(file_of(model))
        with pytest.raises(SourceError, match=said):
            write_shards(prepared, tmp_path / "out", SplitOptions(ranks=(1,)))
    assert "manifest.json" not in snapshot(tmp_path / "out")


def test_config_json_counts(model: Path, tmp_path: Path) -> None:
    with FolderSource(model) as source:
        prepared = prepare(source, Cut(2))
        (model / "config.json").write_bytes((model / "config.json").read_bytes() + b" ")
        with pytest.raises(
            SourceError, match=r"config.json: was written to while it was read \([0-9]+ bytes, modified"
        ):
            write_shards(prepared, tmp_path / "out", SplitOptions())
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_tensors_may_change(tmp_path: Path) -> None:
    """It is let go when its header was read: a download of the rest may go on."""
    model = tmp_path / "model"
    tensors = build(model, SPEC)
    write_safetensors(model / "rest.safetensors", {"lm_head.weight": ("BF16", (4,), bytes(8))})
    weight_map = {**dict.fromkeys(tensors, "model-00001-of-00001.safetensors"), "lm_head.weight": "rest.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with FolderSource(model) as source:
        prepared = prepare(source, Cut(2))
        (model / "rest.safetensors").unlink()
        assert write_shards(prepared, tmp_path / "out", SplitOptions()).complete


@each_change
def test_merge_keeps_nothing_of_it(case: str, model: Path, tmp_path: Path) -> None:
    change, said = CHANGES[case]
    split(model, tmp_path / "tp1", Cut(1))
    with FolderSource(tmp_path / "tp1") as source:
        checkpoint = read_shard_set(source)
        change(tmp_path / "tp1" / shard_file(0, 1))
        with pytest.raises(SourceError, match=said):
            merge([(source, checkpoint)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "verify": lambda model, cut: ("verify", cut, "--source", model, "--quiet"),
    "check": lambda model, cut: ("check", model, "--tp", 2),
    "check --against": lambda model, cut: ("check", cut, "--against", model),
    "inspect": lambda model, cut: ("inspect", model),
    "estimate": lambda model, cut: ("estimate", model, "--tp", 2),
}


@each_change
@pytest.mark.parametrize("command", list(COMMANDS))
def test_commands_that_only_read_say_so(
    command: str, case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is no longer what is there."""
    change, said = CHANGES[case]
    split(model, tmp_path / "tp1", Cut(1))
    path, close = file_of(model), FolderSource.check_unchanged

    def late(source: FolderSource) -> None:
        if source.path == model and path.exists():
            change(path)
        close(source)

    monkeypatch.setattr(FolderSource, "check_unchanged", late)
    done = reshard(*COMMANDS[command](model, tmp_path / "tp1"))
    assert done.code == 1
    assert said in done.err


# --- the runtime ---


def load_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Something happens, once, between the header of a shard and its tensors."""
    fill, changes = Opened.fill, [change]

    def fill_late(opened: Opened, into: memoryview, start: int) -> int:
        while changes:
            changes.pop()()
        return fill(opened, into, start)

    monkeypatch.setattr(Opened, "fill", fill_late)


@each_change
def test_the_loader_refuses(case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = CHANGES[case]
    split(model, tmp_path / "tp1", Cut(1))
    load_with(monkeypatch, lambda: change(tmp_path / "tp1" / shard_file(0, 1)))
    with pytest.raises(ShardError, match=said):
        load_shard(tmp_path / "tp1", 0)


def test_the_loader_takes_the_tensors_of_the_file_whose_header_it_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another set's shard, of the same header, has the name when the tensors are read, and no longer at the end."""
    build(tmp_path / "elsewhere" / "model", Spec(files=1, seed=7))
    for folder, name in ((model, "tp1"), (tmp_path / "elsewhere" / "model", "other")):
        split(folder, tmp_path / name, Cut(1))
    right = load_shard(tmp_path / "tp1", 0).layer(0).down.tensors["weight"].clone()
    path, wrong = tmp_path / "tp1" / shard_file(0, 1), tmp_path / "other" / shard_file(0, 1)
    os.link(path, tmp_path / "kept")
    difference = Opened.difference

    def swap_back(opened: Opened) -> str | None:
        (tmp_path / "kept").replace(path)
        return difference(opened)

    load_with(monkeypatch, lambda: wrong.replace(path))
    monkeypatch.setattr(Opened, "difference", swap_back)
    assert torch.equal(load_shard(tmp_path / "tp1", 0).layer(0).down.tensors["weight"], right)


@each_change
def test_the_plugin_refuses(case: str, model: Path, tmp_path: Path) -> None:
    change, said = CHANGES[case]
    split(model, tmp_path / "tp1", Cut(1))
    manifest = parse_manifest((tmp_path / "tp1" / "manifest.json").read_bytes())
    path = file_of(model)
    read = read_others([str(path)], [manifest], lambda name: False, same=True)
    next(read)
    change(path)
    with pytest.raises(ShardError, match=said):
        list(read)


def test_the_plugin_compares_the_header_of_the_file_that_it_reads(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "tp1", Cut(1))
    manifest = parse_manifest((tmp_path / "tp1" / "manifest.json").read_bytes())
    replaced(file_of(model))
    with pytest.raises(ReshardError, match=r"the shard set was cut from .* with header"):
        list(read_others([str(file_of(model))], [manifest], lambda name: False, same=True))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a FIFO, expected a file"):
        Opened(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a folder, expected a file"):
        Opened(tmp_path)


@each_change
def test_a_file_whose_data_was_read_is_not_let_go_of(case: str, model: Path) -> None:
    """Another part of the checkpoint needs nothing of it; the first one has some of its bytes in memory."""
    change, said = CHANGES[case]
    with FolderSource(model) as source:
        prepare(source, Cut(2))
        source.release(file_of(model).name)
        change(file_of(model))
        with pytest.raises(SourceError, match=said):
            source.check_unchanged()


@each_change
def test_a_file_whose_header_was_read_must_be_the_same_when_it_is_read_again(case: str, model: Path) -> None:
    change, _ = CHANGES[case]
    name = file_of(model).name
    with FolderSource(model) as source:
        read_header(source, name)
        source.release(name)
        source.read(name, 0, 8)
        source.release(name)
        change(file_of(model))
        source.check_unchanged()  # nothing of it is used
        for _ in range(2):
            with pytest.raises(SourceError, match=f"{name}(: is no longer the file whose header was read|: cannot be)"):
                source.read(name, 0, 8)
