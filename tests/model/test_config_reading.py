"""config.json where it is nested, contradicts itself or has keys that are not known."""

from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.checkpoint.config_only import config_checkpoint
from reshard.errors import LayersError, SchemeError, SourceError
from reshard.model.activation import Activation
from reshard.model.config import (
    agree_on_dense,
    has_experts,
    is_mtp_layer,
    known_dense_layers,
    language_config,
    read_model_config,
)
from reshard.model.config.families import FAMILIES
from reshard.model.config.read import ModelConfig
from reshard.model.config.rules import EXPERT_COUNTS, RULES
from reshard.source.open import describe, open_source
from tests.support.builders import Spec, build
from tests.support.corrupt import config as edit_config
from tests.support.corrupt import tensors as edit_tensors

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "hidden_act": "silu"}


def read(**keys: Any) -> ModelConfig:
    """A four-layer model with these keys."""
    return read_model_config(SIZES | keys)


# What keys say


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"num_routed_experts": 8, "num_dense_layers": 3, "model_type": "pangu_ultra_moe"}, {0, 1, 2}),
        ({"num_experts": 8, "num_dense_layers": 1}, {0}),
        ({"moe_num_experts": 8, "moe_layers_enum": "1,3"}, {0, 2}),
        ({"moe_num_experts": 8, "moe_layers_enum": [2, 3]}, {0, 1}),
        ({"n_routed_experts": 8, "is_moe_layer": [False, True, True, False]}, {0, 3}),
        ({"n_routed_experts": 8, "layer_freq": [0, 1, 1, 1]}, {0}),
        ({"moe_num_experts": [8, 8], "moe_layer_start_index": [1, 1], "moe_layer_end_index": [2, 3]}, {0}),
        ({"moe_num_experts": 8, "moe_layer_start_index": 2, "moe_layer_end_index": 2}, {0, 1, 3}),
        ({"num_experts": 8, "model_type": "sarvam_moe", "first_k_dense_replace": 1, "moe_layer_freq": 2}, {0, 2}),
        ({"num_experts": 1, "model_type": "hunyuan_v1_dense"}, {0, 1, 2, 3}),
        ({"num_experts": 1, "model_type": "hunyuan_v1_moe"}, {0, 1, 2, 3}),
        ({"num_experts": [4, 8, 4, 8], "model_type": "hunyuan_v1_moe"}, set()),
        ({"num_experts": 8, "model_type": "hunyuan_v1_moe", "moe_layer_num_skipped": 0}, set()),
        ({"num_experts": 8, "model_type": "hunyuan_v1_moe", "moe_layer_num_skipped": 1}, {0}),
        ({"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "n_routed_experts": 8}, set()),
        ({"model_type": "deepseek_v4", "n_routed_experts": 8}, set()),
        ({"model_type": "deepseek_v3"}, {0, 1, 2}),
        ({"model_type": "deepseek_v3", "n_routed_experts": None}, {0, 1, 2, 3}),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": None}, {0, 1, 2}),
    ],
    ids=str,
)
def test_layers(keys: dict[str, Any], layers: AbstractSet[int]) -> None:
    model = read(**keys)
    assert model.dense_layers == layers, model.reason
    assert model.is_stated


FIRST = {"n_routed_experts": 8, "first_k_dense_replace": 2}
NOT_IN_TRANSFORMERS: dict[str, tuple[dict[str, Any], AbstractSet[int]]] = {
    "kimi_k2": (FIRST | {"moe_layer_freq": 1}, {0, 1}),
    "deepseek": (FIRST | {"moe_layer_freq": 2}, {0, 1, 3}),
    "bailing_moe": ({"num_experts": 8, "first_k_dense_replace": 1}, {0}),
    "bailing_moe_v2": ({"num_experts": 8, "first_k_dense_replace": 1, "use_bias": False}, {0}),
    "bailing_moe_linear": ({"num_experts": 8, "first_k_dense_replace": 1, "linear_silu": True}, {0}),
    "ernie4_5_moe_vl": (
        {
            "moe_num_experts": [8, 8],
            "moe_layer_start_index": [1, 1],
            "moe_layer_end_index": [3, 2],
            "fuse_swiglu": True,
        },
        {0},
    ),
    "mimo": ({"num_nextn_predict_layers": 1}, {0, 1, 2, 3}),
    "pangu_ultra_moe": ({"num_routed_experts": 8, "num_dense_layers": 3}, {0, 1, 2}),
    "pangu_embedded": ({"bias": True}, {0, 1, 2, 3}),
    "minimax_m3_text": (
        {"num_local_experts": 8, "moe_layer_freq": [0, 0, 1, 1], "dense_intermediate_size": 512},
        {0, 1},
    ),
    "param2moe": ({"num_experts": 8, "first_k_dense_replace": None}, {0}),
    "sarvam_moe": ({"num_experts": 8, "first_k_dense_replace": 1}, {0}),
    "sarvam_mla": ({"num_experts": 8, "first_k_dense_replace": 1, "moe_layer_freq": 2}, {0, 2}),
    "step3_text": ({"moe_num_experts": 8, "moe_layers_enum": "1,3"}, {0, 2}),
}
"""Families whose code is another engine's: keys as their published configs have them, and the dense layers."""


@pytest.mark.parametrize("model_type", sorted(NOT_IN_TRANSFORMERS))
def test_families_of_other_engines(model_type: str) -> None:
    keys, layers = NOT_IN_TRANSFORMERS[model_type]
    model = read(model_type=model_type, **keys)
    assert model.dense_layers == layers, model.reason
    assert (model.doubts, model.bias) == ((), None)
    assert model.activation(0) == (FAMILIES[model_type].fixed or Activation("silu"))


def test_every_family_of_another_engine_is_tested() -> None:
    others = {name for name, family in FAMILIES.items() if family.source != "transformers"}
    assert others == NOT_IN_TRANSFORMERS.keys()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"n_routed_experts": 8, "moe_every": 2}, "n_routed_experts = 8, and moe_every is not known"),
        (
            {"n_routed_experts": 8, "dense_until": 2, "moe_from": 3},
            "n_routed_experts = 8, and dense_until, moe_from is",
        ),
        ({"expert_layers": [1, 2]}, "model_type None, and expert_layers is not known"),
        ({"num_local_experts": 8}, "num_local_experts = 8 and no key that names dense layers"),
        ({"num_experts": 8, "first_k_dense_replace": None}, "names dense layers (first_k_dense_replace is null)"),
        ({"num_experts": 1}, "num_experts = 1 and no key that names dense layers"),
        ({"n_routed_experts": 8, "mlp_layer_types": ["dense", "linear", "moe", "moe"]}, "mlp_layer_types has 'linear'"),
    ],
    ids=str,
)
def test_what_is_not_known_is_no_answer(keys: dict[str, Any], reason: str) -> None:
    """The names decide, with a warning; without names there is no number."""
    model = read(**keys)
    assert model.dense_layers is None
    assert reason in model.reason
    (warning,) = agree_on_dense({0, 1}, model)
    assert reason in warning
    assert warning.endswith("the dense layers (0-1) are taken from names alone")
    with pytest.raises(LayersError, match="which layers are dense is not known without the tensors' names; give the"):
        known_dense_layers(model)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "moe_router_bias": True},
        {"norm_topk_prob": True, "router_aux_loss_coef": 0.1, "moe_k": 2, "expert_capacity": 3, "sparse_attention": {}},
        {"moe_every": 0, "dense_until": None, "moe_layers_at": []},
    ],
    ids=str,
)
def test_other_keys_of_experts_say_nothing_of_layers(keys: dict[str, Any]) -> None:
    assert read(n_routed_experts=8, first_k_dense_replace=1, **keys).doubts == (
        "config.json: model_type None is not known here: which layers are dense (first_k_dense_replace = 1) is not "
        "sure without the tensors' names",
    )


# Names against keys


def test_a_key_that_is_known_and_disagrees_is_an_error() -> None:
    model = read(model_type="deepseek_v3", n_routed_experts=8, first_k_dense_replace=None, moe_layer_freq=1)
    with pytest.raises(LayersError) as caught:
        agree_on_dense({0}, model)
    assert str(caught.value) == (
        "config.json and the tensors' names disagree on the dense layers: config.json (first_k_dense_replace is null, "
        "deepseek_v3 then has 3, moe_layer_freq = 1) gives 0-2, the names give 0 (only in config.json: 1-2; only in "
        "the names: none); is config.json of this checkpoint?"
    )


def test_no_keys_of_experts_and_an_unknown_family() -> None:
    """Nothing says that every layer is dense: names that say otherwise are believed, with a warning."""
    model = read(model_type="new")
    assert agree_on_dense({0, 1, 2, 3}, model) == ()
    (warning,) = agree_on_dense({0}, model)
    assert warning == (
        "config.json (no experts, num_hidden_layers = 4) gives 0-3: the dense layers (0) are taken from names alone"
    )
    with pytest.raises(LayersError, match="disagree on the dense layers"):
        agree_on_dense({0}, read(model_type="llama"))


def test_two_keys_that_contradict_each_other() -> None:
    model = read(model_type="glm_moe_dsa", mlp_layer_types=["dense"] * 3 + ["sparse"], first_k_dense_replace=1)
    assert model.dense_layers == frozenset({0, 1, 2})
    assert agree_on_dense({0, 1, 2}, model) == ()
    (warning,) = agree_on_dense({0}, model)
    assert warning.startswith("config.json contradicts itself: mlp_layer_types = ")
    assert warning.endswith("but first_k_dense_replace = 1, as the names say")
    with pytest.raises(LayersError, match="disagree"):
        agree_on_dense({0, 1}, model)
    (doubt,) = model.doubts
    assert "contradicts itself on the dense layers" in doubt


def test_layers_behind_the_last() -> None:
    with pytest.raises(
        LayersError, match=r"num_hidden_layers is 4, and the names have dense layers 0-1, 4: 4 is behind"
    ):
        agree_on_dense({0, 1, 4}, read(model_type="llama"))


# A config alone


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "new"}, "model_type 'new' is not known here: which layers are dense (no experts, num_hidden"),
        ({"model_type": "llama", "hidden_act": "situ"}, "its activation is situ, whose formula is not known here"),
        ({"model_type": "qwen3", "swiglu_foo": 2}, "its activation is silu and swiglu_foo = 2, whose formula"),
    ],
    ids=str,
)
def test_a_config_alone_is_warned_of(keys: dict[str, Any], says: str) -> None:
    (warning,) = config_checkpoint(SIZES | keys, "model").warnings
    assert says in warning


def test_a_config_alone_of_a_family_that_is_known() -> None:
    pangu = {"num_routed_experts": 8, "num_dense_layers": 3, "num_mtp_layers": 1, "model_type": "pangu_ultra_moe"}
    found = config_checkpoint(SIZES | pangu, "model")
    assert [layer.index for layer in found.layers] == [0, 1, 2]
    assert found.warnings == ()
    with pytest.raises(LayersError, match=r"no dense layer: config.json \(mixtral: every layer is a MoE layer"):
        config_checkpoint(SIZES | {"model_type": "mixtral", "num_local_experts": 8}, "model")
    with pytest.raises(LayersError, match="llama4_text: its layers are named feed_forward"):
        config_checkpoint(SIZES | {"model_type": "llama4_text", "num_local_experts": 8}, "model")
    with pytest.raises(SchemeError, match="mlp_bias is set: dense layers with a bias are not cut"):
        config_checkpoint(SIZES | {"model_type": "llama", "mlp_bias": True}, "model")


# Experts, as an engine asks


@pytest.mark.parametrize(
    ("keys", "moe"),
    [
        ({"num_routed_experts": 256}, True),
        ({"text_config": SIZES | {"n_routed_experts": 8}}, True),
        ({"moe_num_experts": [64, 64]}, True),
        ({"num_experts": 1}, True),
        ({"num_experts": 0}, False),
        ({"model_type": "deepseek_v3"}, True),
        ({"model_type": "deepseek_v3", "n_routed_experts": None}, False),
        ({"model_type": "llama"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_experts(keys: dict[str, Any], moe: bool) -> None:
    assert has_experts(keys) is moe


# Nested


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config", "thinker_config.text_config"])
def test_nested(key: str) -> None:
    nested: dict[str, Any] = SIZES | {"model_type": "deepseek_v3", "n_routed_experts": 8, "first_k_dense_replace": 1}
    config: dict[str, Any] = nested
    for name in reversed(key.split(".")):
        config = {"model_type": "wrapper", "vision_config": {"num_hidden_layers": 27, "hidden_size": 8}, name: config}
    assert language_config(config) == (key, nested)
    model = read_model_config(config)
    assert (model.wrapper, model.model_type, model.hidden_size, model.dense_layers) == (
        key,
        "deepseek_v3",
        64,
        frozenset({0}),
    )


def test_nested_and_at_the_top() -> None:
    nested = SIZES | {"model_type": "deepseek_v2", "n_routed_experts": 8, "first_k_dense_replace": 1}
    model = read_model_config(SIZES | {"model_type": "deepseek_vl_v2", "language_config": nested})
    assert (model.wrapper, model.model_type, model.dense_layers) == (None, "deepseek_v2", frozenset({0}))
    with pytest.raises(SourceError) as caught:
        read_model_config(SIZES | {"intermediate_size": 128, "language_config": nested})
    assert str(caught.value) == (
        "config.json contradicts itself: intermediate_size is 128 at its top and 256 in language_config; make it the "
        "one of the tensors in both"
    )


@pytest.mark.parametrize(
    ("key", "top", "nested"),
    [
        ("swiglu_limit", 7.0, 10.0),
        ("swiglu_limits", [1.0, 2.0], [1.0, 3.0]),
        ("dense_intermediate_size", 128, 256),
        ("mlp_bias", True, False),
        ("num_nextn_predict_layers", 1, 0),
        ("first_k_dense_replace", 1, 2),
        ("activation_function", "gelu", "silu"),
        ("mlp_multipliers", [1.0], [0.5]),
        ("some_clamp", 1, 2),
        ("dense_layer_indices", [0], [1]),
    ],
)
@pytest.mark.parametrize("second", ["llm_config", ""])
def test_every_key_that_decides_is_compared(key: str, top: object, nested: object, second: str) -> None:
    """At the top and in the nested config, or in two nested ones; what decides nothing may differ."""
    text = SIZES | {"model_type": "glm5_next_text", "vocab_size": 1, key: nested}
    other = SIZES | {"vocab_size": 2, key: top}
    config = {"text_config": text, **({second: other} if second else other)}
    with pytest.raises(SourceError) as caught:
        language_config(config)
    at = f"in {second}" if second else "at its top"
    assert f"config.json contradicts itself: {key} is {top!r} {at} and {nested!r} in text_config" in str(caught.value)
    found = language_config(
        {"text_config": text, **({second: {**other, key: nested}} if second else other | {key: None})}
    )
    assert found[1][key] == nested


BARE = {key: value for key, value in SIZES.items() if key != "hidden_act"}
GLM5 = BARE | {"model_type": "glm5_next_text", "first_k_dense_replace": 1, "n_routed_experts": 8}
FOO = BARE | {"model_type": "foo"}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("swiglu_limit", 7.0, GLM5),
        ("hidden_act", "gelu", BARE | {"model_type": "deepseek_v3"}),
        ("hidden_act", "silu", FOO),
        ("mlp_bias", True, BARE | {"model_type": "llama"}),
        ("num_nextn_predict_layers", 1, GLM5),
        ("some_clamp", 7.0, FOO),
        ("first_k_dense_replace", 1, BARE | {"model_type": "deepseek_v3"}),
        ("dense_layer_indices", [0], FOO),
    ],
)
@pytest.mark.parametrize("level", ["", "thinker_config"])
def test_a_key_that_decides_and_stands_elsewhere(key: str, value: object, text: dict[str, Any], level: str) -> None:
    """Engines read the nested config alone, at whatever other level the key stands."""
    name = "thinker_config.text_config" if level else "text_config"
    nested = {"text_config": text, key: value}
    with pytest.raises(SourceError) as caught:
        read_model_config({level: nested} if level else nested)
    at = f"in {level}" if level else "at its top"
    assert f"config.json: {key} = {value!r} stands {at} and not in {name}, where engines read" in str(caught.value)
    assert f"move it into {name}" in str(caught.value)


def test_a_key_that_decides_and_differs_at_the_top_of_a_wrapper() -> None:
    with pytest.raises(
        SourceError, match=r"contradicts itself: swiglu_limit is 7\.0 at its top and 10\.0 in text_config"
    ):
        language_config({"swiglu_limit": 7.0, "text_config": GLM5 | {"swiglu_limit": 10.0}})


@pytest.mark.parametrize(
    ("top", "text"),
    [
        ({"swiglu_limit": 10.0, "hidden_act": "swish", "mlp_bias": False}, GLM5),
        ({"swiglu_limit": 7.0}, GLM5 | {"swiglu_limit": 7.0}),
        ({"hidden_act": "gelu"}, BARE | {"model_type": "gemma3_text"}),
        ({"activation_sparsity": 0.9}, BARE | {"model_type": "gemma3n_text"}),
        ({"hidden_size": 8, "intermediate_size": 16, "model_type": "kimi_k25", "dtype": "bfloat16"}, FOO),
        ({"projector_hidden_act": "gelu", "mlp_connector_layers": 2, "vision_feature_layer": -2}, FOO),
        ({"swiglu_limit": None, "some_clamp": 0, "timm_override_act_layers": [None, None], "num_mtp_layers": 0}, FOO),
    ],
    ids=str,
)
def test_keys_at_the_top_of_a_wrapper_that_change_nothing(top: dict[str, Any], text: dict[str, Any]) -> None:
    assert language_config({**top, "text_config": text}) == ("text_config", text)


def test_nested_under_a_key_that_is_not_known() -> None:
    with pytest.raises(SourceError, match="no num_hidden_layers at its top; it stands in brain_config, of which"):
        read_model_config({"brain_config": SIZES, "vision_config": {"num_hidden_layers": 2}})


def test_a_nested_config_without_sizes() -> None:
    """LLaVA 1.5's names nothing but its class, DeepSeek-VL's one of the three."""
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096}
    model = read_model_config({"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": tower})
    assert (model.wrapper, model.num_hidden_layers, model.hidden_size, model.intermediate_size) == (
        *("text_config", 32, 4096),
        11008,
    )
    assert model.doubts == (
        "config.json: text_config does not say num_hidden_layers 32, hidden_size 4096, intermediate_size 11008: the "
        "defaults of llama are taken",
    )
    model = read_model_config({"language_config": {"model_type": "llama", "num_hidden_layers": 30}})
    assert (model.num_hidden_layers, model.hidden_size) == (30, 4096)


@pytest.mark.parametrize(
    ("nested", "said"),
    [
        ({"model_type": "new"}, "text_config has no num_hidden_layers and no hidden_size, and the defaults of"),
        (
            {"model_type": "new", "num_hidden_layers": 2},
            "text_config has no hidden_size, and the defaults of model_type",
        ),
        ({"num_hidden_layers": 2}, "text_config has no hidden_size, and the defaults of model_type None are not known"),
    ],
    ids=str,
)
def test_a_nested_config_without_sizes_of_a_class_that_is_not_known(nested: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match="write the model's there") as caught:
        read_model_config({"text_config": nested, "vision_config": {"num_hidden_layers": 24}})
    assert said in str(caught.value)


def test_towers_are_not_told_as_candidates() -> None:
    with pytest.raises(SourceError, match="num_hidden_layers is None"):
        read_model_config({"vision_config": SIZES, "audio_config": SIZES})


def test_an_encoder_and_a_decoder() -> None:
    with pytest.raises(
        SourceError, match=r"an encoder and a decoder .* serve this one without denseffn_tensor_parallel"
    ):
        read_model_config({"model_type": "t5gemma", "encoder": SIZES, "decoder": SIZES})


# Sizes


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"ff_intermediate_size": 512},
            "no intermediate_size, but ff_intermediate_size = 512; where that is the dense",
        ),
        ({"block_ff_dim": 512, "ffn_hidden_size": 9}, "but block_ff_dim = 512, ffn_hidden_size = 9; where"),
        ({"block_configs": [{"ffn": {"ffn_mult": 2.0}}]}, "block_configs gives each layer a width of its own: such a"),
        ({"moe_intermediate_size": 32}, "intermediate_size is None, expected a whole number from 1"),
    ],
    ids=str,
)
def test_the_width_under_another_key(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError) as caught:
        read(intermediate_size=None, **keys)
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"])
def test_the_intermediate_size_of_dense_layers(key: str) -> None:
    assert read(**{key: 512}).intermediate_size == 512
    assert read(**{key: None}).intermediate_size == 256


def test_sizes_by_layer() -> None:
    assert read(intermediate_size=[256] * 4).intermediate_size == 256
    with pytest.raises(SourceError, match="intermediate_size differs from layer to layer"):
        read(intermediate_size=[256, 256, 128, 128])


# What a layer computes


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"hidden_act": "swish"}, Activation("silu")),
        ({"hidden_act": "gelu_new"}, Activation("gelu_tanh")),
        ({"hidden_act": "relu2"}, Activation("relu2")),
        ({"hidden_act": None, "hidden_activation": "gelu"}, Activation("gelu")),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, Activation("hidden_act silu or hidden_activation gelu")),
        ({"hidden_act": None}, None),
        ({"hidden_act": None, "model_type": "qwen3"}, Activation("silu")),
        ({"hidden_act": None, "model_type": "gemma2"}, Activation("gelu_tanh")),
        ({"model_type": "glm5_next_text", "swiglu_limit": 7}, Activation("silu", 7.0)),
        ({"model_type": "glm5_next_text"}, Activation("silu", 10.0)),
        ({"model_type": "glm5_next_text", "swiglu_limit": None}, Activation("silu")),
        ({"model_type": "hy_v4", "swiglu_limit": 7.0}, Activation("silu")),
        ({"model_type": "llama", "swiglu_limit": 7.0}, Activation("silu and swiglu_limit = 7.0")),
        ({"swiglu_limit": 7.0}, Activation("silu and swiglu_limit = 7.0")),
        ({"swiglu_limit": None, "swiglu_alpha": 0, "mlp_clamp": []}, Activation("silu")),
        ({"mlp_multipliers": [0.5, 2.0]}, Activation("silu and mlp_multipliers = [0.5, 2.0]")),
        ({"activation_sparsity_pattern": [0.9, 0.0]}, Activation("silu and activation_sparsity_pattern = [0.9, 0.0]")),
        ({"minimax": 1, "hidden_act": "swigluoai", "swiglu_alpha": 1.7}, Activation("swigluoai")),
        ({"model_type": "gemma", "hidden_act": "gelu"}, Activation("gelu_tanh")),
        (
            {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
            Activation("gelu_tanh"),
        ),
        (
            {"model_type": "gemma", "hidden_act": None, "hidden_activation": "gelu"},
            Activation("hidden_act gelu_tanh or hidden_activation gelu"),
        ),
        ({"model_type": "deepseek_v3", "ffn_clip": 10.0}, Activation("silu and ffn_clip = 10.0")),
        ({"model_type": "deepseek_v3", "silu_limit": 7}, Activation("silu and silu_limit = 7")),
        ({"nonlinearity": "gelu"}, Activation("silu and nonlinearity = gelu")),
        ({"use_ffn_norm": True}, Activation("silu and use_ffn_norm = True")),
        ({"sparse_topk_ffn": 32}, Activation("silu and sparse_topk_ffn = 32")),
        ({"mlp_config": {"act": "gelu"}}, Activation("silu and mlp_config = {'act': 'gelu'}")),
        ({"hidden_act": None, "nonlinearity": "gelu"}, Activation("nonlinearity = gelu")),
        ({"activation_sparsity_ratio": 0.9}, Activation("silu and activation_sparsity_ratio = 0.9")),
        ({"swiglu_bias": 1.0}, Activation("silu and swiglu_bias = 1.0")),
        *(
            ({key: 7}, Activation(f"silu and {key} = 7"))
            for key in (
                *("swiglu_limit_per_token", "swiglu_limit_moe", "init_swiglu_limit", "act_limit_length", "gate_cap"),
                *("hidden_act_kernel", "ffn_act_backend", "activation_token_scale", "ffn_project_multiplier"),
                *("mlp_logit_scale", "mlp_quant_scale", "intermediate_clip_dim", "max_gate_value", "activation_ratio"),
            )
        ),
        ({"moe_swiglu_limit": 7, "expert_swiglu_limit": 7, "ffn_dim": 8, "mlp_dropout": 0.1}, Activation("silu")),
        ({"mlp_bias": True, "mlp_ratio": 4, "use_gated_mlp": True, "mlp_expansion": 3}, Activation("silu")),
        ({"fuse_swiglu": True, "fused_mlp": True, "ffn_dim_multiplier": 1.3, "gated_mlp": True}, Activation("silu")),
        (
            {"linear_silu": True, "use_mixed_mlp_moe": True, "clip_qkv": 8, "tune_mm_mlp_adapter": True},
            Activation("silu"),
        ),
        ({"chunk_size_feed_forward": 1, "mlp_layer_types": ["dense"] * 4, "feature_size": 3}, Activation("silu")),
        ({"final_logit_softcapping": 30.0, "activation_dropout": 0.1, "router_activation": "x"}, Activation("silu")),
        (
            {"mamba_hidden_act": "x", "projector_hidden_act": "gelu", "expert_swiglu_limit_list": [7]},
            Activation("silu"),
        ),
    ],
    ids=str,
)
def test_activation(keys: dict[str, Any], activation: Activation | None) -> None:
    assert read(**keys).activation(0) == activation


def test_limits_by_layer() -> None:
    step = read(model_type="step3p5", swiglu_limits=[7.0] * 4, swiglu_limits_shared=[0.0, None, 16.0, 16.0, 16.0])
    assert [step.activation(layer) for layer in range(4)] == [
        *(Activation("silu"), Activation("silu")),
        *(Activation("silu clamped behind the activation", 16.0),) * 2,
    ]
    exaone = read(model_type="exaone_moe", swiglu_limits=[10.0, -0.0, 0, None])
    assert [exaone.activation(layer) for layer in range(4)] == [
        Activation("silu clamped by vLLM and not by transformers", 10.0),
        *(Activation("silu"),) * 3,
    ]


@pytest.mark.parametrize("value", ["7", True, -1.0, float("inf"), [7.0]], ids=str)
def test_a_limit_that_makes_no_sense(value: object) -> None:
    with pytest.raises(SourceError, match=r"config\.json: swiglu_limit is .*, expected a number above 0"):
        read(model_type="glm5_next_text", swiglu_limit=value)


# Any value of any key


_KEYS = sorted(
    {key for rule in RULES.values() for key in rule.keys}
    | {*EXPERT_COUNTS, "model_type", "hidden_act", "swiglu_limit", "swiglu_limits", "swiglu_limits_shared"}
    | {"num_mtp_layers", "intermediate_size", "dense_intermediate_size", "num_hidden_layers", "text_config", "mlp_bias"}
)
_VALUES = (
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=True) | st.just("1,2") | st.text(max_size=3)
)
_MODELS = st.sampled_from(sorted(FAMILIES))


@settings(max_examples=800, deadline=None)
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES | st.lists(_VALUES, max_size=5)), _MODELS | _VALUES)
def test_whatever_a_config_holds_is_read_or_refused_in_a_line(keys: dict[str, Any], model_type: object) -> None:
    config = SIZES | {"model_type": model_type} | keys
    try:
        has_experts(config)
        model = read_model_config(config)
    except SourceError:
        return
    assert model.dense_layers is None or model.dense_layers <= set(range(model.num_hidden_layers))
    assert len(model.activations) == model.num_hidden_layers


# MTP layers


@pytest.mark.parametrize(
    "key", ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_modules"]
)
def test_counts_of_mtp_layers(key: str) -> None:
    assert read(**{key: 2}).mtp_layers == 2
    with pytest.raises(SourceError, match=f"{key} is -1"):
        read(**{key: -1})


@pytest.mark.parametrize("name", ["eh_proj.weight", "enorm.weight", "shared_head.norm.weight", "embed_tokens.weight"])
def test_names_of_mtp_layers(name: str) -> None:
    assert is_mtp_layer(["mlp.gate_proj.weight", name])
    assert not is_mtp_layer(["mlp.gate_proj.weight", f"self_attn.{name}", "input_layernorm.weight"])


@pytest.mark.parametrize("with_config", [True, False])
def test_a_dense_mtp_layer_is_left_alone_and_told(with_config: bool, tmp_path: Path) -> None:
    """By the names beside it: config.json counts none."""
    folder = tmp_path / "model"
    build(folder, Spec(dense=2))

    def add(every: dict[str, Any]) -> None:
        for name in [name for name in every if name.startswith("model.layers.1.mlp.")]:
            every[name.replace(".1.", ".3.", 1)] = every[name]
        every["model.layers.3.eh_proj.weight"] = every["model.layers.0.input_layernorm.weight"]

    edit_tensors(add)(folder)
    edit_config(num_nextn_predict_layers=None)(folder)
    if not with_config:
        (folder / "config.json").unlink()
    with open_source(str(folder)) as source:
        found = describe(source)
    assert [layer.index for layer in found.layers] == [0, 1]
    assert "the dense MLP of the MTP layer 3 is left alone: it is no part of the DenseFFN" in found.warnings
