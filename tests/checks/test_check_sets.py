"""`reshard check` on shard sets: whole ones of every kind pass, and whatever is not as cut is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from reshard.checks.report import CHECKS
from reshard.checks.serving_option import OPTION
from reshard.checks.shardset import check_origin, check_set
from reshard.model.naming import MANIFEST, shard_file
from reshard.plan.pipeline import Cut
from reshard.source.open import describe, open_source
from tests.support.builders import RECIPES, Spec, build, read_safetensors, write_safetensors
from tests.support.checking import failed, findings, of, setup, usage
from tests.support.corrupt import edited_manifest
from tests.support.manifests import tensor
from tests.support.running import reshard, split

RANK_1 = shard_file(1, 2)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    return tmp_path / "model"


@pytest.fixture
def shards(model: Path, tmp_path: Path) -> Path:
    split(model, tmp_path / "set", Cut(2))
    return tmp_path / "set"


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_set_passes(tmp_path: Path, recipe: str, layout: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    split(tmp_path / "model", tmp_path / "set", Cut(2, layout))
    code, found = findings(tmp_path / "set", "--tp", "2,4", "--against", tmp_path / "model", "--device", "npu")
    assert code == 0
    assert {f["severity"] for f in found} <= {"ok", "warning", "skipped"}
    checks = [f["check"] for f in found]
    assert checks[:7] == ["manifest", "ranks", "headers", "layers", "shapes", "scheme", "cut"]
    assert set(checks) <= set(CHECKS)


@pytest.mark.parametrize(
    ("spec", "cut"),
    [
        (Spec("bf16", intermediate=500), Cut(3, pad=True)),
        (Spec("fp8_block", intermediate=1152), Cut(2, pad=True)),
        (Spec("fp8_block"), Cut(1, "separate")),
        (Spec("fp8_block", intermediate=1088), Cut(1, "separate")),
        (Spec("bf16"), Cut(4, weights="w8a8")),
        (Spec("bf16"), Cut(4, weights="w8a8", quant_format="compressed-tensors")),
        (Spec("fp8_block", intermediate=576), Cut(4, weights="bf16")),
        (Spec("modelslim_dynamic", down_recipe="modelslim_float"), Cut(2)),
    ],
)
def test_padded_converted_and_mixed_sets_pass(tmp_path: Path, spec: Spec, cut: Cut) -> None:
    build(tmp_path / "model", spec)
    split(tmp_path / "model", tmp_path / "set", cut)
    assert failed(tmp_path / "set", "--against", tmp_path / "model", "--device", "npu") == []


def test_a_set_that_was_cut_again_passes_against_the_first_source(shards: Path, model: Path, tmp_path: Path) -> None:
    split(shards, tmp_path / "again", Cut(4))
    assert failed(tmp_path / "again", "--against", model) == []
    assert failed(tmp_path / "again", "--against", shards) == []


def test_every_missing_and_wrong_file_is_named_at_once(shards: Path) -> None:
    (shards / shard_file(0, 2)).unlink()
    (shards / RANK_1).write_bytes((shards / RANK_1).read_bytes()[:-1])
    (shards / "config.json").unlink()
    (shards / shard_file(2, 4)).write_bytes(b"")
    wrong = failed(shards)
    assert [check for check, _ in wrong] == ["ranks"] * 4
    for (_, message), file in zip(wrong, (shard_file(0, 2), RANK_1, "config.json", shard_file(2, 4)), strict=True):
        assert message.startswith(f"{file}: ")
    found = findings(shards)[1]
    assert {f["check"] for f in found if f["severity"] == "skipped"} == {"layers", "shapes", "scheme", "cut"}


def test_an_incomplete_set(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    code, found = findings(shards, "--against", "whatever", *setup(2, 4))
    assert code == 3
    assert of(found, "manifest")[0]["message"].startswith("set: holds shards and no manifest.json: the set is incompl")
    assert {f["check"] for f in found if f["severity"] == "skipped"} >= {"ranks", "headers", "cut", "source", "option"}


def changed(shards: Path, change: Change) -> list[tuple[str, str]]:
    edited_manifest(change)(shards)
    return failed(shards)


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        (lambda m: m.update(schema="denseffn-shards/3"), "manifest", "schema is 'denseffn-shards/3'"),
        (lambda m: m.update(note=1), "manifest", "note: Extra inputs are not permitted"),
        (lambda m: m["shards"].pop(), "manifest", "shards are of ranks [0], tp_size 2 makes it 0 to 1"),
        (lambda m: m["shards"].reverse(), "manifest", "ranks [1, 0]"),
        (
            lambda m: m["model"].update(hidden_size=255),
            "shapes",
            "hidden_size is 255, its tensors and",
        ),
        (
            lambda m: m["model"].update(num_hidden_layers=4),
            "layers",
            "num_hidden_layers is 4, its tensors and",
        ),
        (lambda m: m["model"].update(model_type="llama"), "layers", "model_type is 'llama'"),
        (lambda m: m.update(scheme="bf16"), "scheme", "its scheme is bf16, its layers make it w8a8_dynamic"),
        (
            lambda m: m["layers"][1]["linears"]["down_proj"].update(scheme="bf16"),
            "scheme",
            "layers.1.mlp.down_proj: manifest.json says bf16, and its tensors",
        ),
        (lambda m: m["layers"].pop(), "layers", "its layers lack that of model.layers.1.mlp.gate_proj"),
        (lambda m: m["layers"].append(dict(m["layers"][0], index=2)), "layers", "its layers are [0, 1, 2]"),
        (lambda m: m.update(layout="separate"), "cut", "gate_proj.weight: missing; a cut has it: I8 [256, 256]"),
        (lambda m: m.update(padding={"padded_size": 1024, "multiple": 1}), "cut", "padding is"),
        (lambda m: tensor(m, 0, "down_proj.weight").update(dtype="I32"), "headers", "is I8 [256, 256], manifest.json"),
        (lambda m: tensor(m, 1, "down_proj.weight").update(shape=[512, 128]), "headers", "says I8 [512, 128]"),
        (
            lambda m: tensor(m, 1, "down_proj.weight")["slices"][0].update(start=0, stop=256),
            "cut",
            "the shards hold positions 0..256 of dim 1, it has",
        ),
    ],
)
def test_a_manifest_that_is_not_of_its_files(shards: Path, change: Change, check: str, says: str) -> None:
    wrong = changed(shards, change)
    assert check in {found for found, _ in wrong}
    assert any(says in message for _, message in wrong), wrong


def test_ranks_that_were_exchanged(shards: Path) -> None:
    """Same sizes, same shapes: only the headers' own ranks tell."""
    first, second = shards / shard_file(0, 2), shards / RANK_1
    parked = first.rename(shards / "parked")
    second.rename(first)
    parked.rename(second)
    assert failed(shards) == [
        ("headers", f"{shard_file(0, 2)}: its header says tp_rank '1', manifest.json says '0'; copy it again"),
        ("headers", f"{RANK_1}: its header says tp_rank '0', manifest.json says '1'; copy it again"),
    ]


@pytest.mark.parametrize("name", ["shared_experts", "experts.7"])
def test_an_expert_s_weights_have_no_place_in_a_set(shards: Path, name: str) -> None:
    """The first public implementation of the option caught MoE layers: a set that holds some is refused.

    The file and its manifest agree here, so that nothing but the name tells.
    """
    expert = f"model.layers.2.mlp.{name}.down_proj.weight"
    path = shards / shard_file(0, 2)
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    held = read_safetensors(path) | {expert: ("BF16", (8, 8), bytes(128))}
    write_safetensors(path, held, metadata)
    entry = {"name": expert, "dtype": "BF16", "shape": [8, 8], "blake3": blake3(bytes(128)).hexdigest()}
    entry["slices"] = [{"tensor": expert, "shape": [8, 8], "dim": 0, "start": 0, "stop": 8, "at": 0}]

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][0]["tensors"].append(entry)
        manifest["shards"][0]["size"] = path.stat().st_size

    assert changed(shards, change) == [
        ("cut", f"{MANIFEST}: {expert} is sliced, and is no DenseFFN tensor: it must not be in a set"),
        (
            "cut",
            f"{shard_file(0, 2)}: {expert}: {MANIFEST} has it, cutting the set's weights gives none of that name",
        ),
    ]


def test_a_gate_up_that_is_a_slice_of_the_stacked_matrix(shards: Path) -> None:
    """The classic wrong cut: rank 0 all of gate, rank 1 all of up. Every shape is right, the slices are not."""

    def change(manifest: dict[str, Any]) -> None:
        for rank, role in enumerate(("gate_proj", "up_proj")):
            found = tensor(manifest, rank, "gate_up_proj.weight")
            whole = {"tensor": f"model.layers.0.mlp.{role}.weight", "shape": [512, 256], "dim": 0, "at": 0}
            found["slices"] = [{**whole, "start": 0, "stop": 512}]

    wrong = changed(shards, change)
    assert [check for check, _ in wrong] == ["cut", "cut"]
    assert "gate_proj.weight [512, 256] dim 0 0..512 at 0, a cut gives model." in wrong[0][1]


# What it was cut from, and for.


def test_another_source(shards: Path, tmp_path: Path) -> None:
    build(tmp_path / "other", Spec("modelslim_dynamic", dense=1))
    wrong = failed(shards, "--against", tmp_path / "other")
    assert {check for check, _ in wrong} == {"source"}
    text = "\n".join(message for _, message in wrong)
    assert "its layers are [0, 1], the source's [0]" in text
    assert "reshard verify --source compares the bytes" in text


def test_a_source_whose_header_changed(shards: Path, model: Path) -> None:
    (file,) = (path for path in model.glob("*.safetensors") if "00001" in path.name)
    write_safetensors(file, read_safetensors(file), {"format": "pt", "of": "another fine-tune"})
    ((check, message),) = failed(shards, "--against", model)
    assert check == "source"
    assert message.startswith(f"{file.name}: the shard set was cut from ")


def test_a_source_that_cannot_be_read_is_1(shards: Path, tmp_path: Path) -> None:
    (shards / "config.json").unlink()
    done = reshard("check", shards, "--against", tmp_path / "none")
    assert (done.code, done.err) == (
        1,
        f"error: {shards}: --against: {tmp_path}/none: no such folder; give the one that holds the checkpoint\n",
    )
    assert "FAILED   ranks     config.json: manifest.json names it and it is missing; copy the whole set" in done.out, (
        "what was found of the set itself still stands"
    )


@pytest.mark.parametrize("commit", ["a" * 40, "b" * 40])
def test_another_commit_of_the_hub_is_a_warning(shards: Path, model: Path, commit: str) -> None:
    """Weights that were trained on have the same names, sizes and headers: only the commit tells."""
    edited_manifest(lambda m: m["source"].update(kind="hub", name="org/model", commit="a" * 40))(shards)
    with open_source(str(shards)) as source:
        _, manifest, _ = check_set(source)
    assert manifest is not None
    with open_source(str(model)) as source:
        original = describe(source)
    original = replace(original, identity=replace(original.identity, kind="hub", name="org/model", commit=commit))
    (found,) = check_origin(manifest, original, "org/model")
    assert found.severity == ("ok" if commit[0] == "a" else "warning")
    if commit[0] == "b":
        assert f"cut from org/model at commit {'a' * 40}, this is org/model at commit {commit}: " in found.message


def test_the_size_that_is_asked_for(shards: Path) -> None:
    assert failed(shards, "--tp", 2) == []
    assert failed(shards, "--tp", "4,8") == [
        ("size", ": cut for tp 2, --tp asks for 4, 8; reshard split SET OUT --tp 4 re-shards it")
    ]
    assert failed(shards, "--tp", "5,8")[0][1].endswith("asks for 5, 8; reshard split SET OUT --tp 8 re-shards it")
    ((_, message),) = failed(shards, "--tp", "5,7")
    assert "dim 0 = 512 is not divisible by tp 5" in message
    assert "re-shards it" not in message


@pytest.mark.parametrize(
    ("arguments", "rule", "says"),
    [
        (setup(2, 4), None, ""),
        (
            setup(4, 4),
            "shards",
            f"{OPTION} is 4, the shard set is cut for 2: set it to 2, or cut it with reshard split",
        ),
        (
            setup(None, 4),
            "unset",
            f"{OPTION} is not set, the shard set is cut for 2, the engine's dense layers are for 1",
        ),
        (setup(None, 1, 2), None, ""),
        (setup(2, 1, 2), None, ""),
        (setup(2, 4, 2), None, ""),
        (setup(1, 1, 2), "size", "is 1; with data-parallel size 1 and tensor-parallel size 2 it may be 2"),
        (
            setup(4, 4, 2),
            "shards",
            "is 4, the shard set is cut for 2: set it to 2, or cut it with reshard split --tp 4",
        ),
        (setup(None, 1, 4), "unset", "are for 4: cut it with reshard split --tp 4"),
    ],
)
def test_the_option_and_the_set(shards: Path, arguments: list[object], rule: str | None, says: str) -> None:
    wrong = failed(shards, *arguments)
    assert [check for check, _ in wrong] == ([f"option-{rule}"] if rule else [])
    assert all(says in message for _, message in wrong)


def test_a_set_is_cut_already(shards: Path) -> None:
    assert "--weights and --pad go with a checkpoint" in usage(shards, "--pad")
    assert "--weights and --pad go with a checkpoint" in usage(shards, "--weights", "bf16")
