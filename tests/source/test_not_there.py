"""Files that are not there: numbers that are missing, places where a checkpoint is not yet or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import ReshardError, SourceError
from reshard.plan.pipeline import Cut
from reshard.source.choice import missing_numbers
from tests.support.builders import Raw, Spec, build, dense_only, read_safetensors, write_safetensors
from tests.support.corrupt import INDEX
from tests.support.refusals import broken_link, refusal, warnings_of
from tests.support.running import split

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
DOUBTS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "known": (
        {},
        "config.json (first_k_dense_replace = 2) makes layers 0-1 dense, and of these the other files hold 0",
    ),
    "no config": (None, "no config.json says which layers are dense"),
    "unknown model": ({"model_type": "minicpm"}, "config.json: model_type 'minicpm' is not known here"),
    "unknown key": ({"model_type": "foo", "first_k_dense_replace": None, "moe_start": 2}, "moe_start"),
}


@pytest.mark.parametrize("command", ["check", "split"])
@pytest.mark.parametrize("case", list(DOUBTS))
def test_a_missing_number_may_hold_a_dense_layer(case: str, command: str, tmp_path: Path) -> None:
    changes, doubt = DOUBTS[case]
    model = in_three(tmp_path / "model", Spec(config=changes or {}))
    (model / SECOND).unlink()
    if changes is None:
        (model / "config.json").unlink()
    said = refusal(model, command)
    assert f"{SECOND} is missing, and no index says what is in it: " in said
    assert doubt in said
    assert said.endswith(f"{WAY}\n")


def test_missing_numbers_of_other_tensors_are_a_warning(tmp_path: Path) -> None:
    model = in_three(tmp_path / "model", Spec())
    assert warnings_of(model) == ()
    split(model, tmp_path / "right", Cut(2))
    (model / THIRD).unlink()
    (line,) = warnings_of(model)
    whole = "every dense layer that config.json names is in the others"
    assert line == f"{THIRD} is missing, and no index says what is in it; {whole}"
    split(model, tmp_path / "out", Cut(2))
    for path in (tmp_path / "right").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("sure", [True, False])
def test_a_family_that_is_not_known_is_never_sure(sure: bool, tmp_path: Path) -> None:
    """The same files and keys: only the code of a known family makes them the whole account."""
    model = in_three(tmp_path / "model", Spec(config={} if sure else {"model_type": "minicpm"}))
    (model / THIRD).unlink()
    if sure:
        assert len(warnings_of(model)) == 1
    else:
        assert "model_type 'minicpm' is not known here" in refusal(model)


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


def test_a_file_that_only_stale_scales_name_is_said_once(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.gate_proj.weight_scale_inv"] = "model-00009-of-00163.safetensors"
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    (line,) = warnings_of(tmp_path / "model")
    assert line.startswith(f"{INDEX} still names scales of dense layers whose weights are not quantized")


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


def test_modelscope_s_unfinished_downloads(tmp_path: Path) -> None:
    build(tmp_path / "model" / "._____temp", Spec())
    said = refusal(tmp_path / "model")
    assert "._____temp in it holds unfinished downloads of ModelScope: let them finish, or start them again" in said
    assert "give" not in said
