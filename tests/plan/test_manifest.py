"""manifest.json: its schema, its strictness, what it says of a set."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from blake3 import blake3

import reshard
from reshard.errors import ManifestError
from reshard.manifest import json_schema, parse_manifest
from reshard.plan.pipeline import Cut
from tests.support.builders import RECIPES, Spec, build, read_safetensors
from tests.support.manifests import edit_manifest, sealed
from tests.support.running import reshard as run
from tests.support.running import split

COMMITTED = Path(reshard.__file__).parent / "denseffn-shards-2.schema.json"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    build(tmp_path / "model", Spec("modelslim_static"))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    return tmp_path / "shards"


def load(shards: Path) -> dict[str, Any]:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert isinstance(manifest, dict)
    return manifest


def test_the_committed_schema_is_the_codes() -> None:
    assert COMMITTED.read_text() == json_schema()


def test_the_command_prints_it() -> None:
    done = run("schema")
    assert done.code == 0
    assert done.out == json_schema()


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_manifests_are_valid_by_the_schema(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text())).validate(load(tmp_path / "shards"))


def test_digests_sizes_and_shapes_are_those_of_the_files(shards: Path) -> None:
    manifest = load(shards)
    assert [shard["tp_rank"] for shard in manifest["shards"]] == [0, 1]
    for shard in manifest["shards"]:
        path = shards / shard["file"]
        assert shard["size"] == path.stat().st_size
        assert shard["blake3"] == blake3(path.read_bytes()).hexdigest()
        tensors = read_safetensors(path)
        assert [tensor["name"] for tensor in shard["tensors"]] == list(tensors)
        for tensor in shard["tensors"]:
            dtype, shape, data = tensors[tensor["name"]]
            assert (tensor["dtype"], tuple(tensor["shape"])) == (dtype, shape)
            assert tensor["blake3"] == blake3(data).hexdigest()


def test_each_layer_says_what_its_linears_are(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block", dense=1))
    split(tmp_path / "model", tmp_path / "shards", Cut(2, layout="separate"))
    (layer,) = json.loads((tmp_path / "shards" / "manifest.json").read_text())["layers"]
    linear = {"scheme": "fp8_block", "block": [128, 128]}
    assert layer["linears"] == {"gate_up_proj": linear, "down_proj": linear}
    assert layer["index"] == 0


def test_the_sources_identity_is_its_files(shards: Path) -> None:
    source = load(shards)["source"]
    assert (source["kind"], source["name"], source["commit"]) == ("folder", "model", None)
    for file in source["files"]:
        raw = (shards.parent / "model" / file["name"]).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert file["size"] == len(raw)
        assert file["header_blake3"] == blake3(raw[: 8 + length]).hexdigest()


def test_slices_say_where_each_tensor_comes_from(shards: Path) -> None:
    tensors = {tensor["name"]: tensor for tensor in load(shards)["shards"][1]["tensors"]}
    prefix = "model.layers.0.mlp"
    assert tensors[f"{prefix}.gate_up_proj.weight"]["slices"] == [
        {"tensor": f"{prefix}.gate_proj.weight", "shape": [512, 256], "dim": 0, "start": 256, "stop": 512, "at": 0},
        {"tensor": f"{prefix}.up_proj.weight", "shape": [512, 256], "dim": 0, "start": 256, "stop": 512, "at": 256},
    ]
    assert tensors[f"{prefix}.down_proj.weight"]["slices"] == [
        {"tensor": f"{prefix}.down_proj.weight", "shape": [256, 512], "dim": 1, "start": 256, "stop": 512, "at": 0}
    ]
    assert tensors[f"{prefix}.down_proj.quant_bias"]["slices"] == []
    assert tensors[f"{prefix}.gate_up_proj.input_scale"]["same_as"] == [f"{prefix}.up_proj.input_scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema="denseffn-shards/3"), "'denseffn-shards/3'"),
        (lambda m: m.update(schema="denseffn-shards/1"), "cut the set again with this version"),
        (lambda m: m.pop("schema"), "None"),
        (lambda m: m.update(more=1), "more"),
        (lambda m: m["shards"][0].update(more=1), "shards.0.more"),
        (lambda m: m["shards"][0]["tensors"][0].update(more=1), "shards.0.tensors.0.more"),
        (lambda m: m["shards"].pop(), "ranks [0]"),
        (lambda m: m["shards"].reverse(), "ranks [1, 0]"),
        (lambda m: m["shards"][0].update(file="../rank"), "shards.0.file"),
        (lambda m: m["shards"][0].update(file="rank"), "its name must be"),
        (lambda m: m["shards"][0].update(blake3="00"), "shards.0.blake3"),
        (lambda m: m.update(tp_size="2"), "tp_size"),
        (lambda m: m.update(tp_size=0), "tp_size"),
        (lambda m: m.update(layout="other"), "layout"),
        (lambda m: m.update(parts=["o_proj"]), "parts are o_proj, expected denseffn among them, each once"),
        (
            lambda m: m.update(parts=["denseffn"] * 2),
            "parts are denseffn, denseffn, expected denseffn among them, each",
        ),
        (lambda m: m.update(parts=["denseffn", "head"]), "unknown part head; known are denseffn, lm_head"),
        (lambda m: m["layers"][0]["linears"].pop("down_proj"), "gate_up_proj, expected gate_up_proj, down_proj"),
        (lambda m: m["layers"][0]["linears"].update(o_proj={"scheme": "bf16"}), "down_proj, o_proj, expected"),
        (lambda m: m["layers"][0]["activation"].update(more=1), "layers.0.activation"),
        (lambda m: m["layers"][0].update(activation={"name": "", "limit": None}), "layers.0.activation"),
        (lambda m: m["layers"][0].update(activation={"name": "silu", "limit": -1.0}), "layers.0.activation"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused(shards: Path, change: Any, message: str) -> None:
    manifest = load(shards)
    change(manifest)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(sealed(manifest))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


SIDE = {"name": "model-00001-of-00001.safetensors", "size": 1, "blake3": "0" * 64}


def described_twice(manifest: dict[str, Any]) -> None:
    (found,) = (file for file in manifest["files"] if file["name"] == "quant_model_description.json")
    manifest["files"].append({**found, "name": "quant_model_description_w8a8.json"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].append(SIDE), f"files.2.name: Value error, {SIDE['name']} is no file that goes with a "),
        (lambda m: m["files"].append({**SIDE, "name": "manifest.json"}), "manifest.json is no file that goes with"),
        (lambda m: m["files"].append({**SIDE, "name": "denseffn-rank-00000-of-00002.safetensors"}), "files.2.name"),
        (lambda m: m["files"].append(m["files"][0]), "files: Value error, name config.json is there twice"),
        (described_twice, "quant_model_description.json and quant_model_description_w8a8.json both describe"),
        (lambda m: m["source"]["files"].append(m["source"]["files"][0]), "source.files: Value error, name model-00001"),
        (lambda m: m["layers"].append(m["layers"][0]), "layers: Value error, index 0 is there twice"),
        (
            lambda m: m["shards"][1]["tensors"].append(m["shards"][1]["tensors"][0]),
            "shards.1.tensors: Value error, name model.layers.0.mlp.gate_up_proj.weight is there twice",
        ),
    ],
)
def test_names_are_known_ones_and_each_is_there_once(shards: Path, change: Any, message: str) -> None:
    edit_manifest(shards, change)
    with pytest.raises(ManifestError, match=re.escape(message)):
        parse_manifest((shards / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema"', b'"tp_size": 7, "schema"', "duplicate key 'tp_size'"),
        (b'"dim": 1', b'"dim": 0, "dim": 1', "duplicate key 'dim'"),
        (b'"at": 256', b'"at": 255', "was changed after it was written: it says that its BLAKE3 is "),
        (b" ", b"  ", "was changed after it was written: it says that its BLAKE3 is "),
        (b'"blake3": "', b'"blake3": "0', "blake3: String should match pattern"),
        (b'"blake3"', b'"Blake3"', "blake3: Field required"),
    ],
)
def test_bytes_that_were_changed_by_hand_are_refused(shards: Path, old: bytes, new: bytes, message: str) -> None:
    path = shards / "manifest.json"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(ManifestError) as caught:
        parse_manifest(path.read_bytes())
    assert message in str(caught.value)


def test_a_manifest_names_its_own_digest(shards: Path) -> None:
    raw = (shards / "manifest.json").read_bytes()
    said = load(shards)["blake3"]
    assert parse_manifest(raw).blake3 == said
    assert blake3(raw.replace(said.encode(), b"0" * 64)).hexdigest() == said
    assert parse_manifest(raw).to_json() == raw


def test_a_manifest_that_is_no_json_is_refused() -> None:
    with pytest.raises(ManifestError, match="not valid JSON"):
        parse_manifest(b"{")
