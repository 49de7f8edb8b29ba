"""config.json: sizes, and which layers are dense, by each model family's own keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from reshard.checkpoint.description import Checkpoint
from reshard.errors import LayersError, SourceError
from reshard.model.activation import Activation
from reshard.model.config import ModelConfig, read_model_config
from reshard.source.open import describe, open_source
from tests.support.builders import Spec, build
from tests.support.corrupt import both, config, tensors

SIZES: dict[str, Any] = {"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 8}


def dense(**keys: Any) -> list[int]:
    """The dense layers of an eight-layer model with these keys."""
    found = read_model_config(SIZES | keys).dense_layers
    assert found is not None
    return sorted(found)


def test_sizes() -> None:
    found = read_model_config(SIZES | {"model_type": "qwen3", "num_nextn_predict_layers": 1})
    assert found == ModelConfig(
        model_type="qwen3",
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=8,
        vocab_size=0,
        attention_size=0,
        tied=False,
        mtp_layers=1,
        dense_layers=frozenset(range(8)),
        reason="no experts, num_hidden_layers = 8",
        activations=(Activation("silu"),) * 8,
    )


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"first_k_dense_replace": 0}, []),
        ({"first_k_dense_replace": 1}, [0]),
        ({"first_k_dense_replace": 3}, [0, 1, 2]),
        ({"first_k_dense_replace": 99}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, [0]),
        # A layer is MoE from first_k_dense_replace on where its index is a multiple of moe_layer_freq.
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [0, 1, 3, 5, 7]),
        ({"first_k_dense_replace": 0, "moe_layer_freq": 3}, [1, 2, 4, 5, 7]),
        ({"moe_layer_freq": 4}, [1, 2, 3, 5, 6, 7]),
        # As a list: 1 for MoE, layer by layer; entries behind the last layer are the MTP layers'.
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1, 1, 1]}, [0, 3]),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1, 1, 1, 0]}, [0, 3]),
        ({"first_k_dense_replace": 2, "moe_layer_freq": [1, 1, 1, 0, 1, 1, 1, 1]}, [0, 1, 3]),
    ],
    ids=str,
)
def test_deepseek_kimi_and_glm(keys: dict[str, Any], layers: list[int]) -> None:
    assert dense(n_routed_experts=64, **keys) == layers


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, []),
        ({"mlp_only_layers": [0, 5], "decoder_sparse_step": 1}, [0, 5]),
        ({"mlp_only_layers": [0, 5]}, [0, 5]),
        # A layer is MoE where its number, counted from 1, is a multiple of decoder_sparse_step.
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [0, 2, 4, 6]),
        ({"decoder_sparse_step": 4}, [0, 1, 2, 4, 5, 6]),
        ({"mlp_only_layers": [3], "decoder_sparse_step": 2}, [0, 2, 3, 4, 6]),
        ({"mlp_only_layers": None, "decoder_sparse_step": 1}, []),
    ],
    ids=str,
)
def test_qwen_moe(keys: dict[str, Any], layers: list[int]) -> None:
    assert dense(num_experts=60, **keys) == layers


def test_mlp_layer_types_go_before_the_older_keys() -> None:
    """transformers 5 writes the list; the older keys may stand beside it."""
    types = ["dense"] * 3 + ["sparse"] * 5
    assert dense(mlp_layer_types=types, n_routed_experts=64, first_k_dense_replace=3) == [0, 1, 2]
    assert read_model_config(SIZES | {"mlp_layer_types": types}).reason == f"mlp_layer_types = {types}"
    assert dense(mlp_layer_types=["sparse", "dense"] * 4, num_experts=8) == [1, 3, 5, 7]


@pytest.mark.parametrize("keys", [{}, {"num_experts": 0}, {"n_routed_experts": None}, {"mlp_only_layers": []}], ids=str)
def test_without_experts_every_layer_is_dense(keys: dict[str, Any]) -> None:
    """Llama, Qwen, and MoE families' own dense sizes."""
    assert dense(**keys) == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, 7168.0, "7168", True])
def test_sizes_must_be_whole_numbers(key: str, value: object) -> None:
    with pytest.raises(SourceError) as caught:
        read_model_config(SIZES | {key: value})
    assert f"config.json: {key} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"n_routed_experts": 8, "first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({"n_routed_experts": 8, "first_k_dense_replace": "3"}, "first_k_dense_replace is '3'"),
        ({"n_routed_experts": 8, "moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"n_routed_experts": 8, "moe_layer_freq": True}, "moe_layer_freq is True"),
        ({"n_routed_experts": 8, "moe_layer_freq": [0, 1]}, "moe_layer_freq has 2 entries for 8 layers"),
        ({"num_experts": 8, "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"num_experts": 8, "mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"num_experts": 8, "mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense"] * 7}, "mlp_layer_types has 7 entries for 8 layers"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000"),  # each layer costs memory
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers is 1000000000, expected a whole number from 0"),
        ({"num_hidden_layers": 10**200}, "num_hidden_layers is 1000"),
        ({"n_routed_experts": "64"}, "n_routed_experts is '64', expected a whole number from 0 to 10000, or a"),
        ({"n_routed_experts": 10**12}, "n_routed_experts is 1000000000000"),
        ({"num_experts": [8, [8]]}, "num_experts is [8, [8]]"),
        ({"num_experts": []}, "num_experts is []"),
        ({"n_routed_experts": 8, "moe_layer_freq": [[]] * 8}, "moe_layer_freq is [], expected true or false, or 1 or"),
        ({"n_routed_experts": 8, "is_moe_layer": ["0"] * 8}, "is_moe_layer is '0', expected true or false"),
        ({"num_experts": 8, "mlp_only_layers": "0," + "9" * 5000}, "mlp_only_layers is '0,999"),
        ({"model_type": []}, "model_type is [], expected a name"),
        ({"model_type": {"a": [[]]}}, "model_type is {'a': [[]]}, expected a name"),
        ({"model_type": "x" * 201}, "expected a name of up to 200 characters"),
        ({"hidden_act": [[]]}, "hidden_act is [[]], expected a name"),
        ({"hidden_act": ""}, "hidden_act is '', expected the name of an activation"),
        ({"mlp_bias": "false"}, "mlp_bias is 'false', expected true or false"),
        ({"text_config": {"model_type": []}, "hidden_size": None, "num_hidden_layers": None}, "hidden_layers is None"),
        ({str(key): key for key in range(1000)}, "1003 keys at its top, up to 1000 are read"),
        ({"text_config": SIZES | {str(key): key for key in range(1000)}}, "keys in text_config, up to 1000 are read"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_model_config(SIZES | keys)
    assert str(caught.value).startswith("config.json: ")
    assert says in str(caught.value)


def described(folder: Path) -> Checkpoint:
    """A folder's description."""
    with open_source(str(folder)) as source:
        return describe(source)


def test_checkpoint_takes_its_sizes_from_the_config(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(dense=2))
    found = described(tmp_path / "model")
    assert [layer.index for layer in found.layers] == [0, 1]
    model = found.model
    assert (model.model_type, model.hidden_size, model.intermediate_size) == ("deepseek_v3", 256, 512)
    assert model.num_hidden_layers == 3
    assert found.warnings == ()


def test_without_config_the_names_decide_and_a_warning_says_so(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(dense=3))
    (tmp_path / "model" / "config.json").unlink()
    found = described(tmp_path / "model")
    assert [layer.index for layer in found.layers] == [0, 1, 2]
    assert (found.model.hidden_size, found.model.intermediate_size) == (256, 512)
    assert found.model.num_hidden_layers is None
    names, activation = found.warnings
    assert names == "no config.json beside the files: the dense layers (0-2) are taken from names alone"
    assert activation.startswith("layers 0-2 are cut and not computed: its activation is not known")


def test_dense_layers_need_not_be_the_first(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(dense=2))
    renumber = {"model.layers.2.": "model.layers.0.", "model.layers.0.": "model.layers.2."}

    def swap(every: dict[str, Any]) -> None:
        moved = {old: every.pop(old) for old in list(every) if old[:15] in renumber}
        every.update({renumber[old[:15]] + old[15:]: raw for old, raw in moved.items()})

    keys = {"num_experts": 1, "n_routed_experts": None, "first_k_dense_replace": None, "mlp_only_layers": [1, 2]}
    both(tensors(swap), config(**keys))(tmp_path / "model")
    assert [layer.index for layer in described(tmp_path / "model").layers] == [1, 2]


def test_prediction_block_is_never_dense(tmp_path: Path) -> None:
    """R1's layer 61 lies behind num_hidden_layers = 61; here it is layer 3, with the names of a dense one."""
    build(tmp_path / "model", Spec(dense=2))

    def as_dense(every: dict[str, Any]) -> None:
        for name in [name for name in every if name.startswith("model.layers.1.mlp.")]:
            every[name.replace(".1.", ".3.", 1)] = every[name]

    tensors(as_dense)(tmp_path / "model")
    found = described(tmp_path / "model")
    assert [layer.index for layer in found.layers] == [0, 1]
    assert not [tensor.name for tensor in found.tensors() if ".layers.3." in tensor.name]
    config(num_nextn_predict_layers=0)(tmp_path / "model")
    with pytest.raises(LayersError, match=r"num_hidden_layers is 3, and the names have dense layers 0-1, 3: 3 is beh"):
        described(tmp_path / "model")


def test_real_configs(real_checkpoint: Path) -> None:
    """What real tools write: hidden 256, intermediate 512, two dense layers of four or all of three."""
    raw = json.loads((real_checkpoint / "config.json").read_text())
    found = read_model_config(raw)
    assert (found.hidden_size, found.intermediate_size, found.mtp_layers) == (256, 512, 1)
    all_dense = real_checkpoint.name.endswith("all-dense")
    assert found.dense_layers == frozenset({0, 1, 2} if all_dense else {0, 1})
    assert found.num_hidden_layers == (3 if all_dense else 4)


@pytest.mark.parametrize("digits", ["1000", "9" * 400])
def test_layers_that_no_model_has(tmp_path: Path, digits: str) -> None:
    """Without config.json the names alone say how many there are."""
    entries: dict[str, Any] = {}
    for role in ("gate", "up", "down"):
        entries[f"model.layers.{digits}.mlp.{role}_proj.weight"] = np.zeros((8, 8), np.float16)
    safetensors.numpy.save_file(entries, tmp_path / "model.safetensors")
    with pytest.raises(LayersError, match=rf"^model\.layers\.{digits}: more than 1000 layers, which no model has"):
        described(tmp_path)
