"""Online transforms are refused wherever a checkpoint says so; what is fused into the weights is cut."""

from typing import Any

import pytest

from reshard.errors import SchemeError, SourceError
from reshard.quantization import Accounts, check_transforms

MLPS = {0: "model.layers.0.mlp", 1: "model.layers.1.mlp"}
WEIGHTS = [f"{mlp}.{role}.weight" for mlp in MLPS.values() for role in ("gate_proj", "up_proj", "down_proj")]
DESCRIPTION = "quant_model_description.json"
REASON = "a rank that holds 1/R of the intermediate features cannot apply it"


def place(location: str, *targets: str, ignore: Any = ()) -> dict[str, Any]:
    """Where a transform applies."""
    return {"targets": list(targets), "location": location, "inverse": False, "ignore": list(ignore)}


def config(*places: dict[str, Any], name: str = "R4") -> Accounts:
    """compressed-tensors with one transform."""
    group = {"type": "hadamard", "randomize": False, "apply": list(places)}
    quantization = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {name: group}}}
    return Accounts({"quantization_config": quantization})


def refusal(accounts: Accounts, *names: str) -> str:
    """The message."""
    with pytest.raises(SchemeError) as caught:
        check_transforms(accounts, MLPS, [*WEIGHTS, *names])
    assert REASON in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("applied", "module"),
    [
        (place("input", r"re:.*down_proj$"), "model.layers.0.mlp.down_proj"),
        (place("input", "Linear", ignore=["lm_head"]), "model.layers.0.mlp.gate_proj"),
        (place("output", "model.layers.1.mlp.up_proj"), "model.layers.1.mlp.up_proj"),
        (place("output", r"re:.*\.mlp$"), "model.layers.0.mlp"),
        (place("input", r"re:.*act_fn$"), "model.layers.0.mlp.act_fn"),
        (place("input", "LlamaMLP"), "model.layers.0.mlp.gate_proj"),
        (place("input", "Linear", ignore=[r"re:.*layers\.0.*"]), "model.layers.1.mlp.gate_proj"),
        (place("a new place", r"re:.*q_proj$"), "model.layers.0.mlp.gate_proj"),
    ],
    ids=str,
)
def test_of_the_config(applied: dict[str, Any], module: str) -> None:
    line = refusal(config(applied))
    assert line.startswith(f"{module}: config.json: quantization_config.transform_config has the transform R4 at its ")
    assert applied["location"] in line


@pytest.mark.parametrize(
    "applied",
    [
        place("weight_input", "Linear"),
        place("weight_output", r"re:.*down_proj$"),
        place("attn_q", r"re:.*self_attn$"),
        place("input", r"re:.*self_attn\.o_proj$", "lm_head"),
        place("output", "LlamaAttention", "Embedding"),
        place("input", "Linear", ignore=[r"re:.*mlp.*"]),
        place("input", "Linear", ignore=["Linear"]),
    ],
    ids=str,
)
def test_what_is_fused_or_elsewhere_is_cut(applied: dict[str, Any]) -> None:
    check_transforms(config(applied), MLPS, WEIGHTS)


def test_a_location_that_is_no_name() -> None:
    assert "has the transform R4 at its ['input']" in refusal(
        config(place("input", "Linear") | {"location": ["input"]})
    )


def test_targets_may_be_one_name() -> None:
    assert "down_proj" in refusal(config(place("input") | {"targets": r"re:.*down_proj$"}))


def test_of_a_nested_config() -> None:
    section = config(place("input", "Linear")).config
    nested = Accounts({"text_config": {"num_hidden_layers": 2, **(section or {})}})
    assert "config.json: text_config.quantization_config.transform_config" in refusal(nested)


@pytest.mark.parametrize("empty", [None, {}, {"config_groups": {}}, {"config_groups": None}])
def test_no_transform(empty: object) -> None:
    check_transforms(Accounts({"quantization_config": {"transform_config": empty}}), MLPS, WEIGHTS)


@pytest.mark.parametrize("groups", [["R4"], {"R4": None}, {"R4": {"apply": None}}, {"R4": {"apply": ["input"]}}])
def test_a_transform_that_cannot_be_read(groups: object) -> None:
    quantization = {"transform_config": {"config_groups": groups}}
    with pytest.raises(SourceError, match=r"config\.json: quantization_config\.transform_config\.config_groups"):
        check_transforms(Accounts({"quantization_config": quantization}), MLPS, WEIGHTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rotation_config", {"r4": True}), ("hadamard_group_size", 32), ("algo_config", [{"name": "rotation"}])],
)
def test_a_key_that_sounds_like_one(key: str, value: object) -> None:
    line = refusal(Accounts({"quantization_config": {"quant_method": "quark", key: value}}))
    assert f"quantization_config.{key} is a transform that is not known" in line


GROUPS = {"config_groups": {"R4": {"apply": [place("input", r"re:.*down_proj$")]}}}
NESTED = {"quantization_config": {"quant_method": "compressed-tensors", "transform_config": GROUPS}}


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"transform_config": GROUPS}, "transform_config"),
        ({"text_config": {"num_hidden_layers": 2, "transform_config": GROUPS}}, "text_config.transform_config"),
        ({"online_hadamard": True}, "online_hadamard"),
        ({"rotation_config": {"r4": True}}, "rotation_config"),
        ({"language_model_config": NESTED}, "language_model_config.quantization_config.transform_config"),
        ({"llm_config": {"text_config": NESTED}}, "llm_config.text_config.quantization_config.transform_config"),
        (
            {"quantization_config": {"config_groups": {"group_0": {"transform_config": GROUPS}}}},
            "quantization_config.config_groups.group_0.transform_config",
        ),
        (
            {"quantization_config": {"config_groups": {"group_0": {"input_activations": {"rotation": "hadamard"}}}}},
            "quantization_config.config_groups.group_0.input_activations.rotation",
        ),
        (
            {"quantization_config": {"export": {"pre_quant_opt": [{"name": "rotation"}]}}},
            "quantization_config.export.pre_quant_opt",
        ),
        ({"stages": [{"quarot": {"online": True}}]}, "stages[0].quarot"),
    ],
    ids=str,
)
def test_a_key_that_sounds_like_one_at_any_level(config: dict[str, Any], path: str) -> None:
    assert refusal(Accounts(config)).startswith(f"config.json: {path} is a transform that is not known; ")


def test_of_a_compression_config_beside_a_quantization_config() -> None:
    both = {"quantization_config": {"quant_method": "fp8"}, "compression_config": NESTED["quantization_config"]}
    line = refusal(Accounts({"language_config": {"num_hidden_layers": 2, **both}}))
    assert "config.json: language_config.compression_config.transform_config has the transform R4 at its input" in line


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"quantization": {"quant_algo": None}, "transforms": {"rotate": True}}, "transforms"),
        ({"quantization": {"quant_algo": "FP8", "rotate": {"enable": True}}}, "quantization.rotate"),
    ],
)
def test_of_modelopt_s_file(content: dict[str, Any], path: str) -> None:
    line = refusal(Accounts({}, modelopt=content))
    assert line.startswith(f"hf_quant_config.json: {path} is a transform that is not known; ")


@pytest.mark.parametrize(
    "config",
    [
        {"transformers_version": "5.0.0", "transformer_layers": 2, "crq_transformer_config": {"layers": 2}},
        {"rotary_dim": 64, "rope_scaling": {"rotation": "half"}, "text_config": {"partial_rotary_factor": 0.5}},
        {"vision_config": {"rotation": True}, "audio_config": {"transform": "mel"}, "label2id": {"rotation": 3}},
        {"online_hadamard": False, "rotation_config": {"r4": False}, "text_config": {"transform_config": None}},
    ],
    ids=str,
)
def test_keys_that_are_none(config: dict[str, Any]) -> None:
    check_transforms(Accounts(config), MLPS, WEIGHTS)


def test_a_transform_that_two_levels_have_is_read_once() -> None:
    section = config(place("weight_input", "Linear")).config or {}
    check_transforms(Accounts({**section, "text_config": {"num_hidden_layers": 2, **section}}), MLPS, WEIGHTS)


def test_quark_s_other_algorithms_are_none() -> None:
    quantization = {"quant_method": "quark", "algo_config": [{"name": "awq"}, {"name": "smoothquant"}]}
    check_transforms(Accounts({"quantization_config": quantization}), MLPS, WEIGHTS)


# Tensors.


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.down_proj.kronecker_rotation_m", "QuaRot's online Kronecker rotation"),
        ("model.layers.1.self_attn.o_proj.kronecker_rotation_n", "QuaRot's online Kronecker rotation"),
        ("model.kronecker_rotation_m", "QuaRot's online Kronecker rotation"),
        ("model.layers.0.mlp.down_proj.div.mul_scale", "smoothing that is not fused"),
        ("model.layers.0.mlp.div.mul_scale", "smoothing that is not fused"),
        ("model.layers.0.mlp.down_proj.linear.weight", "smoothing that is not fused"),
        ("model.layers.0.mlp.gate_proj.left_trans", "FlatQuant's online transform"),
        ("model.layers.0.mlp.down_proj.svd_lowrank_l1", "a low-rank branch beside the weight (SVD)"),
        ("model.layers.0.self_attn.o_proj.v_input.weight", "no transform_config says where the transform v applies"),
        ("lm_head.u_output.weight", "no transform_config says where the transform u applies"),
        ("model.layers.5.mlp.experts.0.down_proj.R4_input.weight", "no transform_config says where"),
    ],
)
def test_of_tensors(name: str, what: str) -> None:
    assert refusal(Accounts({}), name).startswith(f"{name}: {what}")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.5.mlp.experts.3.down_proj.kronecker_rotation_m",
        "model.layers.0.self_attn.o_proj.heads_rotation",
        "model.layers.0.self_attn.o_proj.div.mul_scale",
        "model.layers.0.self_attn.o_proj.linear.weight",
        "model.layers.0.self_attn.o_proj.R1_weight_output.weight",
        "vision_tower.blocks.0.attn.qkv.linear.weight",
        "vision_model.encoder.layers.0.mlp.down_proj.v_input.weight",
    ],
)
def test_tensors_of_other_layers_and_parts(name: str) -> None:
    check_transforms(Accounts({}), MLPS, [*WEIGHTS, name])


def test_a_tensor_whose_transform_the_config_explains() -> None:
    explained = config(place("input", r"re:.*o_proj$"), name="v")
    check_transforms(explained, MLPS, [*WEIGHTS, "model.layers.0.self_attn.o_proj.v_input.weight"])
    assert "transform u" in refusal(explained, "model.layers.0.self_attn.o_proj.u_input.weight")


# ModelSlim's description.


@pytest.mark.parametrize("layers", [["1"], [1], ["model.layers.1"], ["model.layers.1.mlp.down_proj"], ["all"], "all"])
def test_layers_with_an_online_rotation(layers: object) -> None:
    quarot = {"max_tp_size": 4, "heads_rotation": {"layers": ["0"]}, "kronecker_rotation": {"layers": layers}}
    line = refusal(Accounts({}, (DESCRIPTION, {"metadata": {"quarot": quarot}})))
    assert f"{DESCRIPTION}: metadata.quarot.kronecker_rotation names its layer" in line
    assert line.startswith("model.layers.1.mlp: " if "1" in str(layers) else "model.layers.0.mlp: ")


def test_rotations_of_heads_of_other_layers_and_fused_ones() -> None:
    quarot = {"max_tp_size": 4, "heads_rotation": {"layers": ["0", "1"]}, "kronecker_rotation": {"layers": ["3", "10"]}}
    content = {
        "metadata": {"quarot": quarot},
        "optional": {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}},
    }
    check_transforms(Accounts({}, (DESCRIPTION, content)), MLPS, WEIGHTS)


def test_rotations_that_are_not_known() -> None:
    content: dict[str, Any] = {
        "optional": {"quarot": {"rotation_map": {"down_rotation": "optional/quarot.safetensors"}}}
    }
    assert "optional.quarot.rotation_map.down_rotation" in refusal(Accounts({}, (DESCRIPTION, content)))
    content = {"metadata": {"quarot": {"block_rotation": {"layers": ["1"]}}}}
    assert "model.layers.1.mlp: " in refusal(Accounts({}, (DESCRIPTION, content)))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"metadata": {"quarot": {"online_rotation": True}}}, "metadata.quarot.online_rotation"),
        ({"metadata": {"quarot": "online"}}, "metadata.quarot"),
        ({"metadata": {"hadamard": {"size": 64}}}, "metadata.hadamard"),
        ({"optional": {"quarot": {"online": True}}}, "optional.quarot.online"),
        ({"optional": {"quarot": {"kronecker_rotation": {"layers": [0]}}}}, "optional.quarot.kronecker_rotation"),
        ({"rotation": "hadamard_online"}, "rotation"),
        ({"rotation_layers": [0]}, "rotation_layers"),
    ],
    ids=str,
)
def test_globals_that_speak_of_rotations_must_be_known(content: dict[str, Any], key: str) -> None:
    line = refusal(Accounts({}, (DESCRIPTION, content)))
    assert f"{DESCRIPTION}: {key} " in line


@pytest.mark.parametrize(
    "content",
    [
        {"is_rot_used": True, "model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "group_size": 0},
        {"metadata": {"quarot": {"kronecker_rotation": {"layers": []}, "online_rotation": False}}},
        {"metadata": {"quarot": {}, "flags": {"x": 1}}, "optional": {"quarot": {"rotation_map": {}}}},
        {"optional": {"quarot": {"kronecker_rotation": {"layers": [3]}}}},
        {"model.layers.0.self_attn.o_proj.heads_rotation": "FLOAT"},
    ],
    ids=str,
)
def test_globals_that_are_of_no_dense_layer(content: dict[str, Any]) -> None:
    check_transforms(Accounts({}, (DESCRIPTION, content)), MLPS, WEIGHTS)


@pytest.mark.parametrize("wrapper", ["language_config", "thinker_config"])
def test_of_a_config_within(wrapper: str) -> None:
    """At whatever level, and where the sizes stand at the top, too."""
    quantization = config(place("input", r"re:.*down_proj$")).config
    assert quantization is not None
    line = refusal(Accounts({"num_hidden_layers": 2, wrapper: {"num_hidden_layers": 2, **quantization}}))
    assert f"config.json: {wrapper}.quantization_config.transform_config has the transform R4 at its input" in line
