"""Going on with what is there: which shards are kept, who may write which ranks, and when a set is complete."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reshard.errors import OutputError
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build, read_safetensors, write_safetensors
from tests.support.sets import Files, flip, identity, ranks_of, record, shard, snapshot, split, with_records

# --- what is kept ---


def test_resuming_a_finished_set_changes_nothing(tmp_path: Path, finished: Path, source: Path, wanted: Files) -> None:
    out = finished
    before = identity(out)
    result = split(source, out, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([0, 1, 2, 3], [])
    assert result.complete
    assert snapshot(out) == wanted
    assert identity(out) == before


@pytest.mark.parametrize("at", [0, 9, 4096, 100_000, -1])
def test_a_damaged_shard_of_a_finished_set_is_written_again(
    tmp_path: Path,
    finished: Path,
    source: Path,
    wanted: Files,
    at: int,
) -> None:
    out = finished
    flip(out / shard(2), at)
    before = identity(out)
    result = split(source, out, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([0, 1, 3], [2])
    assert snapshot(out) == wanted
    changed = {name for name, stands in identity(out).items() if stands != before[name]}
    assert not changed & {shard(0), shard(1), shard(3)}
    assert shard(2) in changed


@pytest.mark.parametrize("damage", ["flipped", "cut short", "longer", "gone", "record gone"])
def test_a_damaged_shard_of_an_unfinished_set_is_written_again(
    tmp_path: Path,
    source: Path,
    wanted: Files,
    damage: str,
) -> None:
    out = tmp_path / "out"
    split(source, out, ranks=(0, 1, 2))
    path = out / shard(1)
    if damage == "flipped":
        flip(path, 77_777)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif damage == "gone":
        path.unlink()
    else:
        (out / record(1)).unlink()
    result = split(source, out, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([0, 2], [1, 3])
    assert snapshot(out) == wanted


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"fingerprint": "00"}'])
def test_a_damaged_record_is_one_that_is_not_there(tmp_path: Path, source: Path, wanted: Files, content: bytes) -> None:
    out = tmp_path / "out"
    split(source, out, ranks=(1, 2))
    (out / record(1)).write_bytes(content)
    result = split(source, out, resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([2], [0, 1, 3])
    assert snapshot(out) == wanted


def test_a_record_that_was_changed_by_hand_is_one_that_is_not_there(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    split(source, out, ranks=(1, 2))
    path = out / record(1)
    digest = json.loads(path.read_text())["shard"]["tensors"][0]["blake3"].encode()
    path.write_bytes(path.read_bytes().replace(digest, digest[::-1]))
    result = split(source, out, ranks=(1, 2), resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([2], [1])


def test_a_damaged_shard_is_not_taken_into_a_set_of_ranks(tmp_path: Path, source: Path) -> None:
    """The run that finishes a set looks at the others' shards too."""
    out = tmp_path / "out"
    split(source, out, ranks=(0, 1, 2))
    flip(out / shard(1), 5000)
    result = split(source, out, ranks=(3,))
    assert not result.complete
    assert result.missing == (1,)
    assert "manifest.json" not in snapshot(out)


def test_shards_of_other_values_are_not_kept(tmp_path: Path, other: Path, source: Path, wanted: Files) -> None:
    split(other, tmp_path / "out", ranks=(0, 3))
    result = split(source, tmp_path / "out", resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([], [0, 1, 2, 3])
    assert snapshot(tmp_path / "out") == wanted


def test_shards_of_other_values_do_not_complete_a_set(tmp_path: Path, other: Path, source: Path) -> None:
    split(other, tmp_path / "out", ranks=(0, 3))
    result = split(source, tmp_path / "out", ranks=(1, 2))
    assert result.missing == (0, 3)
    assert "manifest.json" not in snapshot(tmp_path / "out")


def test_a_changed_source_file_is_seen_by_its_values(tmp_path: Path, source: Path) -> None:
    """One tensor with other values, anywhere in the model, makes other shards."""
    split(source, tmp_path / "out", ranks=(0,))
    source = Path(shutil.copytree(source, tmp_path / "source"))
    (path,) = [p for p in source.glob("*.safetensors") if "model.layers.0.mlp.down_proj.weight" in read_safetensors(p)]
    tensors = read_safetensors(path)
    dtype, shape, data = tensors["model.layers.0.mlp.down_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = (dtype, shape, bytes(byte ^ 1 for byte in data))
    write_safetensors(path, tensors, {"format": "pt"})
    assert ranks_of(split(source, tmp_path / "out", resume=True).kept) == []


def test_a_finished_set_of_other_values_is_not_taken_for_done(
    finished: Path, source: Path, wanted: Files, other: Path
) -> None:
    """Same names, sizes and headers as the set's own source: only the weights tell that it is another."""
    with pytest.raises(OutputError, match="another source"):
        split(other, finished, resume=True)
    assert snapshot(finished) == wanted


W8A8 = Cut(4, weights="w8a8")
OTHER_OPTIONS = [
    ("modelslim_v0_static", True, Cut(4), Cut(4, "separate")),
    ("bf16", False, Cut(4, "separate"), Cut(4)),
    ("fp16", True, Cut(4), Cut(4, weights="bf16")),
    ("fp16", False, Cut(4), Cut(4, weights="bf16")),
    ("bf16", True, Cut(4), W8A8),
    ("bf16", False, Cut(4), W8A8),
    ("bf16", True, W8A8, replace(W8A8, quant_format="compressed-tensors")),
]


@pytest.mark.parametrize(("recipe", "with_config", "first", "second"), OTHER_OPTIONS)
def test_shards_of_other_options_are_not_kept(
    tmp_path: Path, recipe: str, with_config: bool, first: Cut, second: Cut
) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "source"
    build(folder, Spec(recipe))
    if not with_config:
        (folder / "config.json").unlink()
    split(folder, tmp_path / "wanted", cut=second)
    split(folder, tmp_path / "out", cut=first, ranks=(1,))
    result = split(folder, tmp_path / "out", cut=second, resume=True)
    assert ranks_of(result.kept) == []
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "wanted")


@pytest.mark.parametrize(("recipe", "with_config", "first", "second"), OTHER_OPTIONS)
def test_a_finished_set_of_other_options_is_not_taken_for_done(
    tmp_path: Path, recipe: str, with_config: bool, first: Cut, second: Cut
) -> None:
    pytest.importorskip("torch")
    folder, out = tmp_path / "source", tmp_path / "out"
    build(folder, Spec(recipe))
    if not with_config:
        (folder / "config.json").unlink()
    split(folder, out, cut=first)
    before = snapshot(out)
    with pytest.raises(OutputError, match="other options"):
        split(folder, out, cut=second, resume=True)
    assert snapshot(out) == before


def test_resume_with_another_tp_is_refused(tmp_path: Path, source: Path) -> None:
    split(source, tmp_path / "out", ranks=(0,))
    before = snapshot(tmp_path / "out")
    with pytest.raises(OutputError, match="shards of tp 4, this split is for tp 2"):
        split(source, tmp_path / "out", tp=2, resume=True)
    assert snapshot(tmp_path / "out") == before


# --- ranks ---


def test_ranks_of_two_folders_copied_together(tmp_path: Path, source: Path, wanted: Files) -> None:
    for folder, ranks, lacking in (("a", (0, 1), (2, 3)), ("b", (2, 3), (0, 1))):
        result = split(source, tmp_path / folder, ranks=ranks)
        assert not result.complete
        assert result.missing == lacking
        assert snapshot(tmp_path / folder).keys() == with_records(ranks)
    for path in (tmp_path / "b").iterdir():
        shutil.copy2(path, tmp_path / "a")
    before = identity(tmp_path / "a")
    result = split(source, tmp_path / "a", resume=True)
    assert (ranks_of(result.kept), ranks_of(result.written)) == ([0, 1, 2, 3], [])
    assert snapshot(tmp_path / "a") == wanted
    after = identity(tmp_path / "a")
    assert all(after[shard(rank)] == before[shard(rank)] for rank in range(4))


@pytest.mark.parametrize("order", [[(0, 1), (2, 3)], [(3,), (0, 2), (1,)], [(2, 1, 0), (3,)]], ids=str)
def test_the_last_ranks_complete_the_set(
    tmp_path: Path,
    source: Path,
    wanted: Files,
    order: list[tuple[int, ...]],
) -> None:
    for ranks in order:
        assert "manifest.json" not in snapshot(tmp_path / "out")
        result = split(source, tmp_path / "out", ranks=ranks)
        assert ranks_of(result.written) == sorted(ranks)
    assert result.complete
    assert snapshot(tmp_path / "out") == wanted
