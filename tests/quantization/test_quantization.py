"""What description and config.json say of each linear, and which scheme its tensors then are."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.description import Checkpoint
from reshard.errors import SchemeError, SourceError
from reshard.model.parts import DENSE_FFN, DOWN, GATE, UP
from reshard.plan.manifest_builder import scheme_name
from reshard.quantization import Accounts, list_accounts
from reshard.source.open import describe, open_source
from tests.support.builders import CHECKPOINTS, REAL, RECIPES, Spec, build, dense_only

ROLES = [role.name for role in DENSE_FFN.roles]

DESCRIPTION = "quant_model_description.json"
MODULE = "model.layers.0.mlp.gate_proj"
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DYNAMIC: dict[str, Any] = RECIPES["ct_dynamic"].quantization_config or {}


def declared(
    quantization: object,
    module: str = MODULE,
    description: Mapping[str, Any] | None = None,
) -> tuple[str, tuple[int, int] | None, str]:
    """(kind, block, said by) for a module of a config with this quantization_config."""
    config = {} if quantization is None else {"quantization_config": quantization}
    first, *_ = list_accounts(Accounts(config, (DESCRIPTION, description) if description is not None else None))
    found = first.declare(module)
    assert found is not None
    return found.kind, found.block, found.said_by


def group(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' dynamic W8A8 with other weights."""
    changed = copy.deepcopy(DYNAMIC)
    changed["config_groups"]["group_0"]["weights"].update(weights)
    return changed


def inputs(**activations: Any) -> dict[str, Any]:
    """compressed-tensors' dynamic W8A8 with other activations."""
    changed = copy.deepcopy(DYNAMIC)
    changed["config_groups"]["group_0"]["input_activations"].update(activations)
    return changed


def described(folder: Path) -> Checkpoint:
    """A folder's description."""
    with open_source(str(folder)) as source:
        return describe(source)


def schemes(checkpoint: Checkpoint) -> set[tuple[str, str, str]]:
    """(gate, up, down) of every layer."""
    return {tuple(layer.linears[role].variant.scheme for role in ROLES) for layer in checkpoint.layers}  # type: ignore[misc]


# ModelSlim's description.


def test_description_goes_before_the_config() -> None:
    types = {f"{MODULE}.weight": "W8A8_DYNAMIC"}
    assert declared(FP8, description=types) == ("W8A8_DYNAMIC", None, f"{DESCRIPTION} (W8A8_DYNAMIC)")
    assert declared({"quant_method": "stub"}, description=types)[0] == "W8A8_DYNAMIC"


def test_entries_decide_not_the_type_of_the_whole_file() -> None:
    """Nor that of a module whose name begins alike: layer 1's entries are not layer 11's."""
    one, eleven = "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate_proj"
    types = {"model_quant_type": "W8A8_DYNAMIC", f"{one}.weight": "FLOAT", f"{eleven}.weight": "W8A8"}
    assert declared(None, one, types)[0] == "FLOAT"
    assert declared(None, eleven, types)[0] == "W8A8"


# config.json.


def test_without_quantization_config() -> None:
    assert list_accounts(Accounts({})) == list_accounts(Accounts()) == ()


def test_fp8_has_the_config_s_block() -> None:
    assert declared(FP8) == ("fp8-block", (128, 128), "config.json (quant_method fp8)")
    assert declared(FP8 | {"weight_block_size": [64, 256]})[1] == (64, 256)


@pytest.mark.parametrize("sizes", [[128], [128, 0], [128, 128.0], "128", [128, 128, 128], [True, 128]])
def test_fp8_with_a_block_that_is_none(sizes: object) -> None:
    with pytest.raises(SourceError) as caught:
        declared(FP8 | {"weight_block_size": sizes})
    assert f"config.json: quantization_config.weight_block_size is {sizes!r}" in str(caught.value)


def test_fp8_without_blocks_has_one_scale_per_tensor() -> None:
    without_block = {key: value for key, value in FP8.items() if key != "weight_block_size"}
    assert declared(without_block)[:2] == ("fp8-tensor-dynamic", None)
    assert declared(without_block | {"activation_scheme": "static"})[:2] == ("fp8-tensor-static", None)


def test_static_fp8_in_blocks_and_e5m2_get_kinds_that_no_variant_has() -> None:
    """They are refused by these names when the variant is looked for."""
    assert declared(FP8 | {"activation_scheme": "static"})[0] == "FP8 with activation_scheme static"
    assert declared(FP8 | {"fmt": "e5m2"})[0] == "FP8 E5M2"


BLOCK_INT8 = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("quantization", "kind", "block"),
    [
        (BLOCK_INT8, "int8-block", (128, 128)),
        ({"quant_method": "w8a8_int8"}, "int8-channel-dynamic", None),
        ({"quant_method": "w8a8_fp8"}, "fp8-channel", None),
        ({"quant_method": "w4afp8"}, "fp8-block", (128, 128)),
        ({"quant_method": "w4afp8", "weight_block_size": [64, 128]}, "fp8-block", (64, 128)),
    ],
    ids=str,
)
def test_methods_of_one_kind(quantization: dict[str, Any], kind: str, block: tuple[int, int] | None) -> None:
    said_by = f"config.json (quant_method {quantization['quant_method']})"
    assert declared(quantization) == (kind, block, said_by)


def test_a_method_in_blocks_without_their_size() -> None:
    with pytest.raises(SourceError, match="weight_block_size is None, expected two block sizes"):
        declared({"quant_method": "blockwise_int8"})


@pytest.mark.parametrize(
    ("quantization", "kind", "block"),
    [
        (RECIPES["ct_dynamic"].quantization_config, "int8-channel-dynamic", None),
        (RECIPES["ct_static"].quantization_config, "int8-channel-static", None),
        (RECIPES["ct_static_asymmetric"].quantization_config, "int8-channel-static-asymmetric", None),
        (RECIPES["ct_fp8_channel"].quantization_config, "fp8-channel", None),
        (RECIPES["ct_fp8_block"].quantization_config, "fp8-block-compressed", (128, 128)),
    ],
)
def test_compressed_tensors(quantization: object, kind: str, block: tuple[int, int] | None) -> None:
    assert declared(quantization) == (kind, block, "config.json (compressed-tensors group_0)")


@pytest.mark.parametrize(
    ("quantization", "spelt"),
    [
        (group(num_bits=4, strategy="group"), "weights int4 group symmetric, activations int8 token dynamic=True"),
        (group(symmetric=False), "weights int8 channel asymmetric, activations int8 token dynamic=True"),
        (group(strategy="tensor"), "weights int8 tensor symmetric, activations int8 token dynamic=True"),
        (group(type="float"), "weights float8 channel symmetric, activations int8 token dynamic=True"),
        (inputs(num_bits=4), "weights int8 channel symmetric, activations int4 token dynamic=True"),
        (inputs(strategy="tensor"), "weights int8 channel symmetric, activations int8 tensor dynamic=True"),
        (inputs(symmetric=False), "weights int8 channel symmetric, activations int8 token asymmetric dynamic=True"),
        (inputs(dynamic="local"), "weights int8 channel symmetric, activations int8 token dynamic=local"),
    ],
)
def test_compressed_tensors_of_other_kinds_are_spelt_out(quantization: object, spelt: str) -> None:
    assert declared(quantization)[0] == spelt


def test_weight_only_is_no_dynamic_scheme() -> None:
    weight_only = copy.deepcopy(DYNAMIC)
    weight_only["config_groups"]["group_0"]["input_activations"] = None
    assert declared(weight_only)[0] == "W8A16 (weights int8 channel symmetric, activations as they are)"


def test_groups_target_modules() -> None:
    """Per-layer mixing: what no group targets is not quantized."""
    mixed = copy.deepcopy(DYNAMIC)
    mixed["config_groups"]["group_0"]["targets"] = [
        r"re:.*layers\.0\.mlp\.(gate|up)_proj$",
        "model.layers.1.mlp.down_proj",
    ]
    quantized = [
        f"model.layers.{i}.mlp.{role}"
        for i in (0, 1)
        for role in ROLES
        if declared(mixed, f"model.layers.{i}.mlp.{role}")[0] != "FLOAT"
    ]
    assert quantized == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


def two_groups(first: list[str], second: list[str], **weights: Any) -> dict[str, Any]:
    """Dynamic W8A8 for the first targets, the same with other weights for the second."""
    both = group()
    both["config_groups"]["group_1"] = group(**weights)["config_groups"]["group_0"] | {"targets": second}
    both["config_groups"]["group_0"]["targets"] = first
    return both


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["Linear"], [r"re:.*mlp\.(gate|up|down)_proj$"]),
        (["Linear"], [MODULE]),
        ([r"re:.*gate_proj$"], [MODULE]),
        ([r"re:.*gate_proj$", "Linear"], ["re:nothing", MODULE]),
    ],
)
def test_the_more_specific_target_wins(first: list[str], second: list[str]) -> None:
    """A name before a pattern before a class, in whatever order the groups stand."""
    for both in (two_groups(first, second, num_bits=4), two_groups(second, first, num_bits=4)):
        wins = "group_1" if both["config_groups"]["group_1"]["targets"] == second else "group_0"
        assert declared(both)[2] == f"config.json (compressed-tensors {wins})"


def test_two_groups_of_one_rank_must_be_alike() -> None:
    patterns = ([r"re:.*gate_proj$"], [r"re:.*mlp.*"])
    assert declared(two_groups(*patterns))[0] == "int8-channel-dynamic"
    with pytest.raises(SourceError, match="into the groups group_0 and group_1, which differ: group_0 is int8-channel"):
        declared(two_groups(*patterns, num_bits=4))


def test_quantized_outputs_are_no_known_scheme() -> None:
    quantized = group()
    quantized["config_groups"]["group_0"]["output_activations"] = {"type": "int", "num_bits": 8}
    assert declared(quantized)[0].endswith(", outputs int8")


@pytest.mark.parametrize(
    "groups", [None, [], {"group_0": None}, {"group_0": {"targets": "Linear"}}, {"group_0": {"targets": [1]}}], ids=str
)
def test_groups_that_are_none(groups: object) -> None:
    with pytest.raises(SourceError, match=r"^config\.json: "):
        declared(DYNAMIC | {"config_groups": groups})


@pytest.mark.parametrize("part", ["weights", "input_activations"])
def test_group_arguments_that_are_no_object(part: str) -> None:
    broken = copy.deepcopy(DYNAMIC)
    broken["config_groups"]["group_0"][part] = ["int8"]
    with pytest.raises(SourceError, match=part):
        declared(broken)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "FP8", "a new one"])
def test_methods_that_are_not_split_keep_their_names(method: str) -> None:
    assert declared({"quant_method": method}) == (method, None, f"config.json (quant_method {method})")


@pytest.mark.parametrize("method", [None, ["fp8"]])
def test_a_method_that_is_no_name_is_spelt_out(method: object) -> None:
    assert declared({"quant_method": method, "bits": 8})[0] == f"quant_method {method!r}"


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
GROUPED = {**FLOAT8, "dynamic": True, "strategy": "group", "group_size": 128}


def of_float8(weights: dict[str, Any], activations: dict[str, Any]) -> dict[str, Any]:
    return group(**{**FLOAT8, **weights}) | {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**FLOAT8, **weights}, "input_activations": activations}
        }
    }


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])
def test_float8_in_blocks(structure: object) -> None:
    made = declared(of_float8({"strategy": "block", "block_structure": structure}, GROUPED))
    assert made[:2] == ("fp8-block-compressed", (128, 128))


BLOCKS = {"strategy": "block", "block_structure": [128, 128]}
CHANNEL = {"strategy": "channel"}
TOKEN = {**FLOAT8, "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("weights", "activations", "spelt"),
    [
        (BLOCKS, TOKEN, "float8 block symmetric, activations float8 token dynamic=True"),
        (BLOCKS, GROUPED | {"group_size": 64}, "float8 block symmetric, activations float8 group of 64 dynamic=True"),
        (BLOCKS, GROUPED | {"symmetric": False}, "activations float8 group of 128 asymmetric dynamic=True"),
        (CHANNEL, TOKEN | {"strategy": "tensor"}, "float8 channel symmetric, activations float8 tensor dynamic=True"),
        (CHANNEL, TOKEN | {"symmetric": False}, "activations float8 token asymmetric dynamic=True"),
        (CHANNEL | {"dynamic": True}, TOKEN, "float8 channel symmetric, activations float8 token dynamic=True"),
    ],
)
def test_float8_whose_activations_are_computed_otherwise(
    weights: dict[str, Any], activations: dict[str, Any], spelt: str
) -> None:
    assert spelt in declared(of_float8(weights, activations))[0]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"group_size": [[]]}, "weights.group_size is [[]], expected a value of type int"),
        ({"num_bits": "8"}, "weights.num_bits is '8', expected a value of type int"),
        ({"symmetric": "false"}, "weights.symmetric is 'false', expected a value of type bool"),
        ({"dynamic": 1}, "weights.dynamic is 1, expected a value of type bool or str"),
        ({"strategy": {}}, "weights.strategy is {}, expected a value of type str"),
    ],
)
def test_arguments_of_another_type(weights: dict[str, Any], says: str) -> None:
    with pytest.raises(
        SourceError, match=r"^config\.json: quantization_config\.config_groups\.\w+\." + re.escape(says)
    ):
        declared(of_float8(CHANNEL | weights, TOKEN))


# Whole checkpoints.


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_recognised(recipe: str, tmp_path: Path) -> None:
    wanted = RECIPES[recipe]
    made = build(tmp_path / "model", Spec(recipe))
    found = described(tmp_path / "model")
    assert schemes(found) == {(wanted.scheme,) * 3}
    assert scheme_name(found.layers) == wanted.scheme
    for layer in found.layers:
        for role in ROLES:
            assert layer.linears[role].tensors.keys() == wanted.tensors.keys() == layer.linears[role].variant.suffixes
    held = {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in found.tensors()}
    assert held == {n: (dtype, shape, len(data)) for n, (dtype, shape, data) in dense_only(made).items()}
    assert found.total_tensors == len(made)
    assert found.total_bytes == sum(len(data) for _, _, data in made.values())


@pytest.mark.parametrize("recipe", ["modelslim_dynamic", "modelslim_static", "modelslim_mix"])
def test_gate_and_up_quantized_with_down_float(recipe: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(recipe, down_recipe="bf16"))
    description = json.loads((tmp_path / "model" / DESCRIPTION).read_text())
    assert description["model.layers.0.mlp.down_proj.weight"] == "FLOAT"
    found = described(tmp_path / "model")
    scheme = RECIPES[recipe].scheme
    assert schemes(found) == {(scheme, scheme, "bf16")}
    assert scheme_name(found.layers) == scheme


def test_static_and_dynamic_in_one_layer(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_static", down_recipe="modelslim_dynamic"))
    found = described(tmp_path / "model")
    assert schemes(found) == {("w8a8_static", "w8a8_static", "w8a8_dynamic")}
    assert scheme_name(found.layers) == "mixed"


def test_down_excepted_by_the_config(tmp_path: Path) -> None:
    config = {"quantization_config": FP8 | {"modules_to_not_convert": [r"re:.*\.down_proj$"]}}
    build(tmp_path / "model", Spec("fp8_block", down_recipe="bf16", config=config))
    found = described(tmp_path / "model")
    assert schemes(found) == {("fp8_block", "fp8_block", "bf16")}
    assert found.layers[0].linears[GATE].block == (128, 128)
    assert found.layers[0].linears[DOWN].block is None


def test_one_layer_excepted_by_the_config(tmp_path: Path) -> None:
    """Layer 0 stays FP8; layer 1 is said to be float and has FP8 tensors: refused."""
    config = {"quantization_config": FP8 | {"modules_to_not_convert": ["model.layers.1.mlp"]}}
    build(tmp_path / "model", Spec("fp8_block", config=config))
    with pytest.raises(SchemeError) as caught:
        described(tmp_path / "model")
    assert "model.layers.1.mlp.gate_proj: config.json (quantization_config.modules_to_not_convert)" in str(caught.value)
    assert "leaves it unquantized" in str(caught.value) or "says bf16" in str(caught.value)
    assert "are fp8_block" in str(caught.value)


def test_a_block_scale_may_look_like_a_channel_scale(tmp_path: Path) -> None:
    """With in_features of one block, the block scale is [n, 1]: shapes don't tell the scheme."""
    build(tmp_path / "model", Spec("ct_fp8_block", hidden=128, intermediate=256))
    found = described(tmp_path / "model")
    assert found.layers[0].linears[UP].tensors["weight_scale"].shape == (2, 1)
    assert schemes(found) == {("fp8_block",) * 3}


REAL_SCHEMES = {
    "llmcompressor-fp8_block": "fp8_block",
    "llmcompressor-w8a8": "w8a8_dynamic",
    "llmcompressor-w8a8-all-dense": "w8a8_dynamic",
    "msmodelslim-w8a8_dynamic_sharded": "w8a8_dynamic",
    "msmodelslim_v0-w8a8_mla_static_mlp_dynamic": "w8a8_dynamic",
    "msmodelslim_v0-w8a8_static": "w8a8_static",
    "tiny-bf16": "bf16",
}


def test_every_real_checkpoint_is_listed() -> None:
    assert sorted(REAL_SCHEMES) == REAL


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(name: str) -> None:
    found = described(CHECKPOINTS / name)
    assert schemes(found) == {(REAL_SCHEMES[name],) * 3}
    assert [layer.index for layer in found.layers] == ([0, 1, 2] if name.endswith("all-dense") else [0, 1])
    for layer in found.layers:
        for role in ROLES:
            assert layer.linears[role].tensors.keys() == layer.linears[role].variant.suffixes
            wanted = (256, 512) if role == DOWN else (512, 256)
            assert layer.linears[role].tensors["weight"].shape == wanted
