"""Folders as people have them: links, partial downloads, indexes that are out of date, two accounts of the weights."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import SourceError, UsageError
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build, dense_only, read_safetensors, write_safetensors
from tests.support.corrupt import FIRST, INDEX, SECOND, mapped
from tests.support.manifests import edit_manifest
from tests.support.refusals import warnings_of
from tests.support.running import reshard, split

SINGLE = "model.safetensors"
SPEC = Spec(files=4)
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", SPEC)
    return tmp_path / "model"


def files_of(model: Path) -> dict[str, list[str]]:
    """The tensors' names by file."""
    return {path.name: list(read_safetensors(path)) for path in sorted(model.glob("*.safetensors"))}


def dense_files(model: Path) -> set[str]:
    return {file for file, names in files_of(model).items() if any(map(_is_dense, names))}


def _is_dense(name: str) -> bool:
    return bool(dense_only({name: ("BF16", (), b"")}))


def without_dense(model: Path) -> str:
    """Move what is not DenseFFN's into a file of its own. Returns its name."""
    every = {name: raw for path in sorted(model.glob("*.safetensors")) for name, raw in read_safetensors(path).items()}
    for path in model.glob("*.safetensors"):
        path.unlink()
    weight_map = {}
    for file, wanted in ((FIRST, True), (SECOND, False)):
        held = {name: raw for name, raw in every.items() if _is_dense(name) == wanted}
        write_safetensors(model / file, held, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return SECOND


def same_shards(model: Path, right: Path, folder: Path) -> None:
    """That both are cut into the same bytes."""
    split(right, folder / "right", Cut(2))
    split(model, folder / "out", Cut(2))
    for path in (folder / "right").glob("*.safetensors"):
        assert (folder / "out" / path.name).read_bytes() == path.read_bytes()


# --- links ---


def test_a_link_in_a_circle_is_a_file_that_is_not_there(model: Path) -> None:
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    assert warnings_of(model) == ()


def test_a_shard_set_may_be_linked_and_its_manifest_may_not_lead_away(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "tp2", Cut(2))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in (tmp_path / "tp2").iterdir():
        (linked / path.name).symlink_to(path)
    assert reshard("verify", linked).code == 0
    raw = (linked / "manifest.json").read_bytes()
    (linked / "manifest.json").unlink()
    (linked / "manifest.json").write_bytes(raw)
    edit_manifest(linked, lambda m: m["files"][0].update(name="../model/config.json"))
    done = reshard("merge", linked, tmp_path / "merged")
    assert done.code == 1
    assert "files.0.name" in done.err
    assert "../model/config.json" in done.err


# --- an index that is written otherwise, or out of date ---


@pytest.mark.parametrize("path", ["../model/" + FIRST, "./../x.safetensors", "sub/x.safetensors", "/etc/x", ".", "./"])
def test_an_index_that_leads_away_is_refused_whatever_the_tensor(path: str, model: Path) -> None:
    mapped("model.norm.weight", path)(model)
    with pytest.raises(SourceError, match=r"maps model.norm.weight to '.*', which is no file of this folder"):
        warnings_of(model)


@pytest.mark.parametrize("what", ["pointer", "zeros", "cut short"])
def test_a_file_of_other_tensors_that_is_not_whole_is_a_warning(what: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "whole")
    path = model / without_dense(model)
    raw = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    path.write_bytes({"pointer": pointer, "zeros": bytes(len(raw)), "cut short": raw[:-9]}[what])
    (line,) = warnings_of(model)
    assert line.startswith("files that cannot be read: 1, with ")
    assert {"pointer": "git lfs pull", "zeros": "zeros", "cut short": "it is cut short"}[what] in line
    same_shards(model, tmp_path / "whole", tmp_path)


def test_a_missing_file_of_a_dense_layer_is_an_error(model: Path, tmp_path: Path) -> None:
    file = sorted(dense_files(model))[0]
    (model / file).unlink()
    with pytest.raises(SourceError, match=rf"{INDEX} maps .*mlp.* to {file}, which is missing; download it"):
        warnings_of(model)


def test_tensors_that_were_dropped_are_a_warning(model: Path) -> None:
    """The MTP layer of R1, taken out of the files and left in the index; a dense one is none of the layers."""
    config = json.loads((model / "config.json").read_text())
    block = config["num_hidden_layers"]
    config["num_nextn_predict_layers"] = 1
    (model / "config.json").write_text(json.dumps(config))
    for name in ("eh_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"):
        mapped(f"model.layers.{block}.{name}", min(files_of(model)))(model)
    (line,) = warnings_of(model)
    assert line.startswith(f"{INDEX} names tensors that no file holds: 3, none of a dense layer (model.layers.{block}.")


def test_a_tensor_that_moved_is_a_warning_unless_it_is_dense(model: Path) -> None:
    other = next(name for names in files_of(model).values() for name in names if not _is_dense(name))
    holder = next(file for file, names in files_of(model).items() if other in names)
    mapped(other, next(file for file in files_of(model) if file != holder))(model)
    assert warnings_of(model) == (f"{INDEX} names tensors in the wrong file: 1, none of a dense layer ({other})",)


def test_a_scale_that_is_lost_is_no_cast(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block", files=1))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    held = read_safetensors(path)
    del held[GATE + "_scale_inv"]
    write_safetensors(path, held)
    with pytest.raises(
        SourceError, match=rf"{INDEX} maps {GATE}_scale_inv to .*, whose header lacks it; no file holds"
    ):
        warnings_of(tmp_path / "model")


def test_what_is_no_scale_is_no_cast(model: Path) -> None:
    mapped("model.layers.0.mlp.gate_proj.bias", min(files_of(model)))(model)
    with pytest.raises(SourceError, match=rf"{INDEX} maps \S+gate_proj.bias to .*, whose header lacks it; no file"):
        warnings_of(model)


# --- two accounts ---


def single(model: Path, change: Callable[[dict[str, Any]], object] = lambda held: None) -> None:
    """All of the model in one file beside the others, as another training might have saved it."""
    held = {name: raw for path in sorted(model.glob("model-*")) for name, raw in read_safetensors(path).items()}
    held = {name: (raw[0], raw[1], bytes(byte ^ 1 for byte in raw[2])) for name, raw in held.items()}
    change(held)
    write_safetensors(model / SINGLE, held, {"format": "pt"})


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "split": lambda model, out: ("split", model, out / "new", "--tp", 2, "--quiet"),
    "check": lambda model, out: ("check", model, "--tp", 2),
    "inspect": lambda model, out: ("inspect", model),
    "estimate": lambda model, out: ("estimate", model, "--tp", 2),
    "verify": lambda model, out: ("verify", out / "cut", "--source", model, "--quiet"),
    "check --against": lambda model, out: ("check", out / "cut", "--against", model),
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_single_file_beside_an_index_is_refused_unless_told(command: str, model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "cut", Cut(2))
    single(model)
    line = COMMANDS[command](model, tmp_path)
    refused = reshard(*line)
    assert refused.code == 1
    for text in (
        f"{SINGLE} stands beside {INDEX}, which does not name it: two accounts of the weights",
        f"transformers takes {SINGLE}, vLLM takes what {INDEX} names",
        f"--index {INDEX} or --index {SINGLE}",
    ):
        assert text in refused.err + refused.out
    told = reshard(*line, "--index", INDEX)
    assert told.code == 0, told.err


def test_index_says_which_bytes_are_cut(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "sharded")
    single(model)
    (tmp_path / "single").mkdir()
    for file in (SINGLE, "config.json"):
        shutil.copy(model / file, tmp_path / "single")
    for index, right in ((INDEX, "sharded"), (SINGLE, "single")):
        split(tmp_path / right, tmp_path / f"right-{right}", Cut(2))
        made = reshard("split", model, tmp_path / f"out-{right}", "--tp", 2, "--index", index, "--quiet")
        assert made.code == 0, made.err
        for path in (tmp_path / f"right-{right}").glob("*.safetensors"):
            assert (tmp_path / f"out-{right}" / path.name).read_bytes() == path.read_bytes()
    assert reshard("verify", tmp_path / "out-single", "--source", model, "--index", SINGLE).code == 0
    assert reshard("verify", tmp_path / "out-single", "--source", model, "--index", INDEX).code == 3


@pytest.mark.parametrize("index", ["nothing.safetensors.index.json", "config.json", "../model/" + INDEX])
def test_index_must_name_an_account_that_is_there(index: str, model: Path) -> None:
    done = reshard("inspect", model, "--index", index)
    assert done.code == 1
    assert f"--index {index}: model has no such index and no such safetensors file; it has " in done.err
    assert FIRST.replace("2.saf", "4.saf") in done.err


def test_index_goes_with_a_checkpoint(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "tp2", Cut(2))
    for line in (
        ("inspect", tmp_path / "tp2"),
        ("check", tmp_path / "tp2"),
        ("check", "--config", model / "config.json", "--tp", 2),
        ("estimate", "--config", model / "config.json", "--tp", 2),
        ("verify", tmp_path / "tp2"),
        ("split", tmp_path / "tp2", tmp_path / "tp1", "--tp", 1),
    ):
        done = reshard(*line, "--index", INDEX)
        assert done.code == UsageError.exit_code, line
        assert "--index" in done.err


def test_a_single_file_that_the_index_names_is_one_account(tmp_path: Path) -> None:
    tensors = build(tmp_path / "model", Spec(files=1))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.rename(path.with_name(SINGLE))
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE)}))
    assert warnings_of(tmp_path / "model") == ()


def test_shards_of_two_versions_without_an_index(model: Path) -> None:
    """Neither is the single file: no --index can tell."""
    (model / INDEX).unlink()
    shutil.copy(model / sorted(dense_files(model))[0], model / "old.safetensors")
    with pytest.raises(
        SourceError, match=r"in two files, model-.* and old.safetensors .*: transformers takes none of"
    ) as c:
        warnings_of(model)
    assert "--index" not in str(c.value)
    assert "to another folder" in str(c.value)


DRAFTS = {"the same names": GATE, "a layer of its own": "model.layers.2.mlp.gate_proj.weight"}


def _single_only(folder: Path) -> Path:
    build(folder / "model", Spec(files=1))
    (path,) = (folder / "model").glob("model-*")
    path.rename(path.with_name(SINGLE))
    (folder / "model" / INDEX).unlink()
    return folder / "model"


BESIDE = {
    "adapter_model.safetensors": "is a LoRA adapter, which is not merged into the weights",
    "consolidated.safetensors": "is Mistral's own format of the same weights, which is left aside",
}


def test_an_adapter_beside_an_index_is_said_too_and_mistral_s_own_is_not(model: Path) -> None:
    for file in BESIDE:
        write_safetensors(model / file, {"layers.0.w1.weight": ("BF16", (4,), bytes(8))})
    (model / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "consolidated.safetensors"}}')
    (line,) = warnings_of(model)
    assert line.startswith("adapter_model.safetensors is a LoRA adapter")


def test_two_indexes_of_which_one_names_nothing_that_is_there(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "without")
    old = "old.safetensors.index.json"
    (model / old).write_text(json.dumps({"weight_map": {GATE: "old-00001-of-00002.safetensors"}}))
    assert warnings_of(model) == (f"{old} names no file that is there; it is passed over",)
    same_shards(model, tmp_path / "without", tmp_path)


# --- no safetensors at all ---


def _touch(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"PK\x03\x04")

    return make


INSTEAD: dict[str, tuple[Iterable[str], tuple[str, ...]]] = {
    "bin": (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), ("PyTorch files", "save_pretrained")),
    "pth": (("consolidated.00.pth", "params.json"), ("PyTorch files (consolidated.00.pth)",)),
    "gguf": (("r1-Q4_K_M-00001-of-00009.gguf",), ("GGUF files", "the safetensors checkpoint that they were made from")),
    "paddle": (("model.pdparams",), ("another framework",)),
    "aria2": (("model.safetensors.aria2",), ("unfinished downloads (model.safetensors.aria2)", "let them finish")),
    "folders": (
        ("rank_0/a.safetensors", "rank_1/a.safetensors"),
        ("rank_0, rank_1 in it do", "one rank's part", "the whole checkpoint"),
    ),
    "adapter": (("adapter_model.safetensors",), ("adapter_model.safetensors is a LoRA adapter", "the model that it")),
    "nothing": (("README.md",), ("it has README.md", "give the folder that has the checkpoint's")),
}


@pytest.mark.parametrize("what", list(INSTEAD))
def test_what_stands_there_instead_is_named(what: str, tmp_path: Path) -> None:
    names, said = INSTEAD[what]
    (tmp_path / "model").mkdir()
    _touch(*names)(tmp_path / "model")
    done = reshard("check", tmp_path / "model", "--tp", 2)
    assert done.code == 1
    for text in ("model: holds no safetensors file of a checkpoint; ", *said):
        assert text in done.err
