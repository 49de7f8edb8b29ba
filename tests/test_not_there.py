"""Files that are not there: broken links, numbers that are missing, places where a checkpoint is not yet or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import ManifestError, ReshardError, ShardError, SourceError
from reshard.naming import shard_file
from reshard.prepare import Cut
from reshard.source.numbered import missing_numbers
from reshard.source.open import describe, open_source
from runtime.loader import load_shard
from tests.builders import Raw, Spec, build, dense_only, read_safetensors, write_safetensors
from tests.corrupt import DESCRIPTION, INDEX
from tests.running import reshard, split

SINGLE = "model.safetensors"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def warnings_of(model: Path) -> tuple[str, ...]:
    with open_source(str(model)) as source:
        return describe(source).warnings


def refusal(model: Path, command: str = "check") -> str:
    """The one line of a checkpoint that cannot be read."""
    line = {"check": ("check", model, "--tp", 2), "split": ("split", model, model.parent / "out", "--tp", 2)}
    done = reshard(*line[command])
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert not (model.parent / "out").exists()
    return done.err


def broken_link(path: Path, target: str = "../blobs/gone") -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# --- links ---


@pytest.mark.parametrize("command", ["check", "split"])
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", DESCRIPTION, INDEX])
def test_a_broken_link_is_no_absent_file(file: str, command: str, tmp_path: Path) -> None:
    """Without config.json names alone decide, without a description or an index the files do: nobody has said so."""
    build(tmp_path / "model", Spec())
    broken_link(tmp_path / "model" / file)
    said = refusal(tmp_path / "model", command)
    assert (
        f"{file} is a link to ../blobs/gone ({tmp_path}/blobs/gone), which is not there (is that disk mounted?)" in said
    )


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("../../blobs/h1", "is a link to ../../blobs/h1 ("),
        ("/disk/of/blobs/h1", "is a link to /disk/of/blobs/h1, which is not there"),
        (SINGLE, f"is a link to {SINGLE}, which leads back to itself"),
    ],
)
@pytest.mark.parametrize("command", ["check", "split"])
def test_the_weights_are_a_broken_link(target: str, says: str, command: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(files=1, index=False))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.unlink()
    broken_link(path.with_name(SINGLE), target)
    said = refusal(tmp_path / "model", command)
    assert f"{SINGLE} {says}" in said
    assert "no safetensors file" not in said


def test_a_description_that_is_not_read_may_be_a_broken_link(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    broken_link(tmp_path / "model" / "quant_model_description_w8a8_dynamic.json")
    (line,) = warnings_of(tmp_path / "model")
    assert line.startswith("quant_model_description_w8a8_dynamic.json is not read, and differs from")


@pytest.mark.parametrize("file", ["manifest.json", "config.json", shard_file(1, 2)])
def test_a_broken_link_in_a_shard_set(file: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    broken_link(tmp_path / "set" / file)
    for command in (
        ("verify", tmp_path / "set"),
        ("merge", tmp_path / "set", tmp_path / "merged"),
        ("check", tmp_path / "set"),
        ("inspect", tmp_path / "set"),
    ):
        done = reshard(*command)
        assert done.code in (1, 3)
        assert "a link to ../blobs/gone (" in done.out + done.err
        assert "copy the whole set" not in done.out + done.err
        assert "--resume" not in done.out + done.err


@pytest.mark.parametrize(("file", "error"), [("manifest.json", ManifestError), (shard_file(1, 2), ShardError)])
def test_the_loader_names_a_broken_link(file: str, error: type[ReshardError], tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    broken_link(tmp_path / "set" / file)
    with pytest.raises(error, match=rf"{file}: is a link to ../blobs/gone \(.*which is not there") as caught:
        load_shard(tmp_path / "set", 1)
    assert "copy" not in str(caught.value)


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
    ("recipe", "more"), [("ct_dynamic", "weight_offset"), ("modelslim_static", "weight_scale"), ("fp8_block", None)]
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
    assert line.startswith(f"{INDEX} still names scales of dense layers whose weights are not quantised")


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


# --- a third account ---


def told(model: Path, value: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": value}))


def test_transformers_weights_that_is_the_account(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    for same in (INDEX, f"./{INDEX}", None):
        told(tmp_path / "model", same)
        assert warnings_of(tmp_path / "model") == ()


@pytest.mark.parametrize("command", ["check", "split"])
def test_transformers_weights_that_is_another_account(command: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    build(model, Spec())
    other = {name: raw for path in model.glob("*.safetensors") for name, raw in read_safetensors(path).items()}
    write_safetensors(model / "tuned.safetensors", other)
    told(model, "tuned.safetensors")
    said = refusal(model, command)
    for text in (
        f"config.json: transformers_weights names tuned.safetensors: another account of the weights than {INDEX}",
        f"transformers takes tuned.safetensors, vLLM takes what {INDEX} names",
        f"--index tuned.safetensors or --index {INDEX}",
    ):
        assert text in said
    for index in ("tuned.safetensors", INDEX):
        assert reshard("check", model, "--tp", 2, "--index", index).code == 0


@pytest.mark.parametrize(
    ("value", "indexed", "says"),
    [
        ("old.safetensors", True, f"which this folder does not have: another account of the weights than {INDEX}"),
        ("old.safetensors", False, "another account of the weights than the other files"),
        (5, True, "transformers_weights names 5, which"),
    ],
)
def test_transformers_weights_that_is_not_there(value: object, indexed: bool, says: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(index=indexed))
    told(tmp_path / "model", value)
    said = refusal(tmp_path / "model")
    assert says in said
    assert f"say which is meant with --index {INDEX}" in said if indexed else "take it out of config.json" in said
    assert "--index old" not in said


def test_two_accounts_and_what_transformers_is_told(tmp_path: Path) -> None:
    """Beside an index that does not name it, transformers would take the single file: it is told another."""
    model = tmp_path / "model"
    build(model, Spec())
    shutil.copy(next(model.glob("*.safetensors")), model / SINGLE)
    told(model, INDEX)
    assert f"two accounts of the weights (transformers and vLLM both take what {INDEX} names)" in refusal(model)
