"""Files that are not there: numbers that are missing, places where a checkpoint is not yet or not."""

import json
import shutil
from pathlib import Path

import pytest

from reshard.errors import ReshardError, SourceError
from reshard.source.choice import missing_numbers
from tests.support.builders import Raw, Spec, build, dense_only, read_safetensors, write_safetensors
from tests.support.corrupt import INDEX
from tests.support.refusals import broken_link, refusal, warnings_of

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))

# --- numbers ---


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"), [SECOND]),
        (("model-00001-of-000004.safetensors",), [f"model-0000{n}-of-000004.safetensors" for n in (2, 3, 4)]),
        (("model-00000-of-00002.safetensors",), ["model-00001-of-00002.safetensors"]),
        (("a-00001-of-00002.safetensors", "b-1-of-1.safetensors"), ["a-00002-of-00002.safetensors"]),
        (("model.safetensors", "model-00001-of-00001.safetensors", "model-1-of-2.bin"), []),
    ],
)
def test_numbers_that_are_missing(files: tuple[str, ...], missing: list[str]) -> None:
    assert missing_numbers(files) == missing


def in_three(folder: Path, spec: Spec) -> Path:
    """Layer 0's MLP in the first file, layer 1's in the second, the rest in the third; no index."""
    build(folder, spec)
    held: dict[str, dict[str, Raw]] = {}
    every = {name: raw for path in folder.glob("*.safetensors") for name, raw in read_safetensors(path).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    dense = dense_only(every)
    for name in every:
        file = THIRD if name not in dense else FIRST if "layers.0." in name else SECOND
        held.setdefault(file, {})[name] = every[name]
    for file, tensors in held.items():
        write_safetensors(folder / file, tensors, {"format": "pt"})
    return folder


WAY = "; download it, or the index of these files (*.safetensors.index.json)"


@pytest.mark.parametrize("sure", [True, False])
def test_a_family_that_is_not_known_is_never_sure(sure: bool, tmp_path: Path) -> None:
    """The same files and keys: only the code of a known family makes them the whole account."""
    model = in_three(tmp_path / "model", Spec(config={} if sure else {"model_type": "minicpm"}))
    (model / THIRD).unlink()
    if sure:
        assert len(warnings_of(model)) == 1
    else:
        said = refusal(model)
        assert "model_type 'minicpm' is not known here" in said
        assert said.endswith(f"{WAY}\n")


def test_several_are_counted(tmp_path: Path) -> None:
    model = in_three(tmp_path / "model", Spec())
    (model / SECOND).unlink()
    broken_link(model / THIRD)
    said = refusal(model)
    assert f"{SECOND}, {THIRD} are not there ({THIRD} is a link to ../blobs/gone (" in said
    assert "and no index says what is in them: config.json (first_k_dense_replace = 2) makes layers 0-1" in said
    assert "download" not in said


def test_a_download_under_way_is_said(tmp_path: Path) -> None:
    model = in_three(tmp_path / "model", Spec())
    (model / SECOND).rename(model / f"{SECOND}.incomplete")
    said = refusal(model)
    assert f"{SECOND}.incomplete beside it says that its download is not finished" in said


def test_scales_in_a_missing_file(tmp_path: Path) -> None:
    """Every weight is there: what is lost is named with the file that may hold it."""
    model = in_three(tmp_path / "model", Spec("fp8_block"))
    held = read_safetensors(model / FIRST)
    write_safetensors(model / FIRST, {name: raw for name, raw in held.items() if not name.endswith("_scale_inv")})
    (model / THIRD).unlink()
    with pytest.raises(ReshardError, match=f"{THIRD} is missing, .*; .*gate_proj.weight_scale_inv: missing"):
        warnings_of(model)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("ct_dynamic", "weight_offset"),
        ("modelslim_static", "weight_scale"),
        ("modelslim_dynamic", None),
        ("fp8_block", None),
    ],
)
def test_what_tools_write_for_some_may_be_in_the_missing_file(recipe: str, more: str | None, tmp_path: Path) -> None:
    """An offset that is lost is no error by the tensors alone, and the weights would be others."""
    model = in_three(tmp_path / "model", Spec(recipe))
    (model / THIRD).unlink()
    if more is None:
        assert len(warnings_of(model)) == 1
        return
    with pytest.raises(SourceError, match=rf"{THIRD} is missing, .*: model.layers.0.mlp.gate_proj may have .*{more}"):
        warnings_of(model)


def test_an_index_accounts_for_what_is_missing(tmp_path: Path) -> None:
    model = in_three(tmp_path / "model", Spec(config={"model_type": "minicpm"}))
    files = {name: path.name for path in model.glob("*.safetensors") for name in read_safetensors(path)}
    (model / INDEX).write_text(json.dumps({"weight_map": files}))
    (model / THIRD).unlink()
    assert f"{INDEX} names files that are not there: 1 ({THIRD})" in " ".join(warnings_of(model))


# --- places ---


def test_the_root_of_a_hub_cache(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    build(root / "snapshots" / "0123abcd", Spec())
    (root / "blobs").mkdir()
    assert "it is a Hugging Face cache, with a folder for each commit: give snapshots/0123abcd in it\n" in refusal(root)
    shutil.copytree(root / "snapshots" / "0123abcd", root / "snapshots" / "4567cdef")
    said = refusal(root)
    assert "give snapshots/0123abcd, snapshots/4567cdef in it, the one of the commit that is meant" in said
    assert "give models--org--name/snapshots/0123abcd, models--org--name/snap" in refusal(tmp_path)
