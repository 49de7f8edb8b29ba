"""merge(split(x)) = x: every DenseFFN tensor's name, dtype, shape and bytes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.plan.pipeline import Cut
from tests.support.builders import RECIPES, Raw, Spec, build, dense_only, read_folder
from tests.support.running import reshard, split


def merged(shards: Path, out: Path) -> dict[str, Raw]:
    """The tensors of a merged set, by the index that was written."""
    done = reshard("merge", shards, out, "--quiet")
    assert done.code == 0, done.err
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_folder(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert {file.name for file in out.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    return tensors


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_real_checkpoints_come_back(real_checkpoint: Path, tmp_path: Path, tp: int, layout: str) -> None:
    split(real_checkpoint, tmp_path / "shards", Cut(tp, layout))
    assert merged(tmp_path / "shards", tmp_path / "merged") == dense_only(read_folder(real_checkpoint))
    for name in ("config.json", "quant_model_description.json"):
        if (real_checkpoint / name).exists():
            assert (tmp_path / "merged" / name).read_bytes() == (real_checkpoint / name).read_bytes()


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    down_float=st.booleans(),
    hidden=st.integers(1, 40),
    intermediate=st.integers(1, 70),
    dense=st.integers(1, 3),
    files=st.integers(1, 4),
    index=st.booleans(),
    tp=st.integers(1, 9),
    layout=st.sampled_from(["fused", "separate"]),
    seed=st.integers(0, 2**32),
)
def test_any_checkpoint_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    recipe: str,
    down_float: bool,
    hidden: int,
    intermediate: int,
    dense: int,
    files: int,
    index: bool,
    tp: int,
    layout: str,
    seed: int,
) -> None:
    """Sizes that divide nothing are padded; the padding is gone after merging."""
    folder = tmp_path_factory.mktemp("any")
    # ModelSlim can leave down unquantized beside quantized gate and up.
    down = "modelslim_float" if down_float and RECIPES[recipe].description else None
    spec = Spec(recipe, hidden, intermediate, dense, files, seed, index, down_recipe=down)
    tensors = build(folder / "model", spec)
    split(folder / "model", folder / "shards", Cut(min(tp, intermediate), layout, pad=True))
    assert merged(folder / "shards", folder / "merged") == dense_only(tensors)


def test_a_padded_set_is_padded_no_more(tmp_path: Path) -> None:
    tensors = build(tmp_path / "model", Spec("fp8_block", 256, 640))
    split(tmp_path / "model", tmp_path / "shards", Cut(4, pad=True))
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["padding"] == {"padded_size": 1024, "multiple": 128}
    assert manifest["model"]["intermediate_size"] == 640
    assert merged(tmp_path / "shards", tmp_path / "merged") == dense_only(tensors)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    done = reshard("merge", tmp_path / "shards", tmp_path / "out")
    assert done.code == 1
    assert "mine.txt" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_damaged_shard_is_not_merged(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    shard = tmp_path / "shards" / "denseffn-rank-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    done = reshard("merge", tmp_path / "shards", tmp_path / "out")
    assert done.code == 1
    assert shard.name in done.err
    assert "BLAKE3" in done.err
    assert not (tmp_path / "out").exists()


def test_only_a_shard_set_is_merged(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    done = reshard("merge", tmp_path / "model", tmp_path / "out")
    assert done.code == 1
    assert "no shard set" in done.err
