"""`--weights`: what is refused, what the result says of itself, and converted sets as sources."""

import json
import sys
from pathlib import Path

import pytest

from reshard.errors import MissingDependencyError, SchemeError
from reshard.plan.manifest_builder import scheme_name
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import describe, open_source
from tests.support.builders import CHECKPOINTS, RECIPES, Spec, build, dense_only
from tests.support.conversions import CONVERTIBLE, FORMATS, TARGETS, bf16, one_file, reference, rewrite, to_torch
from tests.support.cut_by_hand import check_set
from tests.support.running import split
from tests.support.sets import no_fsync, snapshot  # noqa: F401

pytest.importorskip("torch")

MODULES = [f"model.layers.{layer}.mlp.{role}_proj" for layer in (0, 1) for role in ("gate", "up", "down")]


# --- what is refused ---


@pytest.mark.parametrize("quant_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_quantized(tmp_path: Path, value: float, quant_format: str) -> None:
    source, name = tmp_path / "source", "model.layers.1.mlp.down_proj.weight"
    dense = dense_only(build(source, one_file("bf16")))
    values = to_torch(dense[name]).float()
    values[77, 500] = value
    rewrite(source, {name: bf16(values)})
    with pytest.raises(SchemeError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight: row 77 holds (nan|inf)"):
        split(source, tmp_path / "out", Cut(2, weights="w8a8", quant_format=quant_format))
    assert not (tmp_path / "out").exists() or "manifest.json" not in snapshot(tmp_path / "out")


REFUSED = [
    ("modelslim_static", None, "bf16", "modelslim", "gate_proj", "W8A8 "),
    ("modelslim_v0_static", None, "w8a8", "modelslim", "gate_proj", "W8A8 "),
    ("modelslim_mix", None, "w8a8", "modelslim", "gate_proj", "W8A8_MIX"),
    ("modelslim_dynamic", None, "bf16", "modelslim", "gate_proj", "W8A8_DYNAMIC"),
    ("modelslim_dynamic", None, "w8a8", "compressed-tensors", "gate_proj", "W8A8_DYNAMIC"),
    ("modelslim_dynamic", "modelslim_static", "w8a8", "modelslim", "down_proj", "W8A8 "),
    ("ct_static", None, "w8a8", "compressed-tensors", "gate_proj", "int8-channel-static "),
    ("ct_static_asymmetric", None, "bf16", "modelslim", "gate_proj", "int8-channel-static-asymmetric"),
    ("ct_dynamic", None, "w8a8", "modelslim", "gate_proj", "int8-channel-dynamic"),
]


@pytest.mark.parametrize(("recipe", "down", "weights", "quant_format", "role", "kind"), REFUSED)
def test_what_cannot_be_converted_is_named(
    tmp_path: Path, recipe: str, down: str | None, weights: str, quant_format: str, role: str, kind: str
) -> None:
    build(tmp_path / "source", Spec(recipe, down_recipe=down))
    with pytest.raises(SchemeError) as caught:
        split(tmp_path / "source", tmp_path / "out", Cut(2, weights=weights, quant_format=quant_format))
    assert str(caught.value).startswith(f"model.layers.0.mlp.{role}: is {kind}")
    assert "--weights keep" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_compressed_tensors_needs_a_config(tmp_path: Path) -> None:
    build(tmp_path / "source", Spec("bf16"))
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(SchemeError, match=r"config\.json, which the source lacks"):
        split(tmp_path / "source", tmp_path / "out", Cut(2, weights="w8a8", quant_format="compressed-tensors"))
    assert not (tmp_path / "out").exists()


def test_without_torch_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "source", Spec("fp8_block"))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "reshard.convert.compute", raising=False)
    with pytest.raises(MissingDependencyError, match=r"--weights needs torch, which .*: pip install torch"):
        split(tmp_path / "source", tmp_path / "out", Cut(2, weights="bf16"))
    split(tmp_path / "source", tmp_path / "kept", Cut(2))
    assert "manifest.json" in snapshot(tmp_path / "kept")


# --- the result's own account of itself ---


def schemes_of(folder: Path) -> tuple[str, set[str]]:
    with open_source(str(folder)) as opened:
        layers = describe(opened).layers
    return scheme_name(layers), {linear.variant.kind for layer in layers for linear in layer.linears.values()}


@pytest.mark.parametrize("recipe", CONVERTIBLE)
def test_converted_to_bf16(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "source", Spec(recipe, config={"torch_dtype": "float16"}))
    split(tmp_path / "source", tmp_path / "out", Cut(2, weights="bf16"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((tmp_path / "source" / "config.json").read_text())
    original.pop("quantization_config", None)
    if recipe != "bf16":  # which stays as it is
        original["torch_dtype"] = "bfloat16"
    assert config == original
    assert schemes_of(tmp_path / "out") == ("bf16", {"FLOAT"})


@pytest.mark.parametrize("recipe", CONVERTIBLE)
def test_converted_to_modelslim(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "source", Spec(recipe))
    split(tmp_path / "source", tmp_path / "out", Cut(2, weights="w8a8"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description.pop("model_quant_type") == "W8A8_DYNAMIC"
    assert description.pop("version") == "1.0.0"
    suffixes = ("weight", "weight_scale", "weight_offset")
    assert description == {f"{module}.{suffix}": "W8A8_DYNAMIC" for module in MODULES for suffix in suffixes}
    assert schemes_of(tmp_path / "out") == ("w8a8_dynamic", {"W8A8_DYNAMIC"})


@pytest.mark.parametrize("recipe", CONVERTIBLE)
def test_converted_to_compressed_tensors(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "source", Spec(recipe))
    split(tmp_path / "source", tmp_path / "out", Cut(2, weights="w8a8", quant_format="compressed-tensors"))
    assert not (tmp_path / "out" / "quant_model_description.json").exists()
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "int-quantized")
    (group,) = quantization["config_groups"].values()
    assert (
        group["weights"] | {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} == group["weights"]
    )
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True
    assert schemes_of(tmp_path / "out") == ("w8a8_dynamic", {"int8-channel-dynamic"})


@pytest.mark.parametrize("gate_up", ["modelslim_dynamic", "modelslim_v0_dynamic"])
def test_a_mixed_checkpoint_keeps_what_is_quantized(tmp_path: Path, gate_up: str) -> None:
    dense = dense_only(build(tmp_path / "source", Spec(gate_up, down_recipe="bf16")))
    floats = {name: raw for name, raw in dense.items() if ".down_proj." in name}
    wanted = {**dense, **reference(floats, "w8a8", "modelslim")}
    split(tmp_path / "source", tmp_path / "out", Cut(4, weights="w8a8"))
    check_set(tmp_path / "out", wanted, 4, 128, "fused")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made = {
        tensor["name"]: tensor["conversion"] and tensor["conversion"]["rule"]
        for tensor in manifest["shards"][0]["tensors"]
        if ".layers.0." in tensor["name"]
    }
    rule = "quantise_to_int8_per_channel"
    assert made == {
        f"model.layers.0.mlp.{role}.{suffix}": rule if role == "down_proj" else None
        for role in ("gate_up_proj", "down_proj")
        for suffix in ("weight", "weight_scale", "weight_offset")
    }
    assert schemes_of(tmp_path / "out") == ("w8a8_dynamic", {"W8A8_DYNAMIC"})


def test_a_mixed_checkpoint_as_compressed_tensors(tmp_path: Path) -> None:
    quantization = dict(RECIPES["ct_dynamic"].quantization_config or {}, ignore=[r"re:.*down_proj"])
    spec = Spec("ct_dynamic", down_recipe="fp16", config={"quantization_config": quantization})
    dense = dense_only(build(tmp_path / "source", spec))
    assert schemes_of(tmp_path / "source")[1] == {"int8-channel-dynamic", "FLOAT"}
    floats = {name: raw for name, raw in dense.items() if ".down_proj." in name}
    split(tmp_path / "source", tmp_path / "out", Cut(4, weights="w8a8", quant_format="compressed-tensors"))
    check_set(tmp_path / "out", {**dense, **reference(floats, "w8a8", "compressed-tensors")}, 4, 128, "fused")
    assert schemes_of(tmp_path / "out") == ("w8a8_dynamic", {"int8-channel-dynamic"})


@pytest.mark.parametrize(
    ("recipe", "weights", "quant_format"),
    [("bf16", "bf16", "modelslim"), ("modelslim_dynamic", "w8a8", "modelslim"), ("ct_dynamic", "w8a8", FORMATS[1])],
)
def test_what_already_is_so_stays_bit_for_bit(tmp_path: Path, recipe: str, weights: str, quant_format: str) -> None:
    build(tmp_path / "source", Spec(recipe))
    split(tmp_path / "source", tmp_path / "asked", Cut(2, weights=weights, quant_format=quant_format))
    split(tmp_path / "source", tmp_path / "kept", Cut(2))
    assert snapshot(tmp_path / "asked") == snapshot(tmp_path / "kept")


# --- sets and conversions ---


@pytest.mark.parametrize(("weights", "quant_format"), TARGETS)
@pytest.mark.parametrize("recipe", ["fp32", "fp8_block"])
def test_a_converted_set_is_cut_again(tmp_path: Path, recipe: str, weights: str, quant_format: str) -> None:
    build(tmp_path / "source", Spec(recipe))
    for tp in (2, 4):
        split(tmp_path / "source", tmp_path / f"tp{tp}", Cut(tp, weights=weights, quant_format=quant_format))
    split(tmp_path / "tp4", tmp_path / "again", Cut(2))
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "tp2")


@pytest.mark.parametrize(("weights", "quant_format"), TARGETS)
def test_a_set_is_converted_as_its_source_would_be(tmp_path: Path, weights: str, quant_format: str) -> None:
    source = CHECKPOINTS / "llmcompressor-fp8_block"
    split(source, tmp_path / "kept", Cut(4))
    cut = Cut(2, weights=weights, quant_format=quant_format)
    split(source, tmp_path / "direct", cut)
    split(tmp_path / "kept", tmp_path / "through a set", cut)
    assert snapshot(tmp_path / "through a set") == snapshot(tmp_path / "direct")


def test_a_refusal_comes_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` reads no weight for a conversion: a dry run of R1 must not take minutes."""
    build(tmp_path / "source", Spec("fp8_block"))
    monkeypatch.setattr("reshard.convert.compute._Values.get", lambda *block: pytest.fail("computed"))
    with open_source(str(tmp_path / "source")) as opened:
        plan = prepare(opened, Cut(4, weights="w8a8")).plan
    assert {tensor.dtype for tensor in plan.shards[0].tensors} == {"I8", "F32"}
