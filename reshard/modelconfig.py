"""config.json: a model's sizes, and which of its layers are dense."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reshard.errors import SourceError
from reshard.naming import CONFIG

_MAX_LAYERS = 10_000
_MAX_SIZE = 2**31 - 1  # of a dimension: more is no model's
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelConfig:
    """What the cut needs of config.json. `reason` names the keys that make the layers dense."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    prediction_layers: int
    dense_layers: frozenset[int]
    reason: str


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model has expert layers, by the keys that count them: an engine asks no more."""
    return any(config.get(key) for key in _EXPERT_COUNTS)


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Sizes and dense layers. Raises SourceError naming the key that is missing or makes no sense."""
    layers = _number(config, "num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise SourceError(f"{CONFIG}: num_hidden_layers is {layers}, up to {_MAX_LAYERS} are believed")
    dense, reason = _dense_layers(config, layers)
    model_type = config.get("model_type")
    return ModelConfig(
        model_type=model_type if isinstance(model_type, str) else "",
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_number(config, "intermediate_size"),
        num_hidden_layers=layers,
        prediction_layers=_number(config, "num_nextn_predict_layers", default=0),
        dense_layers=dense,
        reason=reason,
    )


def _dense_layers(config: Mapping[str, Any], layers: int) -> tuple[frozenset[int], str]:
    """The rules of transformers' own models, by the keys that a config has.

    mlp_layer_types: a list of "dense" and "sparse" (transformers 5). first_k_dense_replace with moe_layer_freq:
    DeepSeek V2, V3, Kimi K2, GLM. mlp_only_layers with decoder_sparse_step: Qwen MoE. No experts: all are dense.
    """
    every = range(layers)
    types = config.get("mlp_layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) < layers:
            raise SourceError(f"{CONFIG}: mlp_layer_types is not a list of {layers} layers")
        for kind in types:
            if kind not in {"dense", "sparse"}:
                raise SourceError(f"{CONFIG}: mlp_layer_types has {kind!r}; dense and sparse are known")
        return frozenset(i for i in every if types[i] == "dense"), "mlp_layer_types"
    experts = next((key for key in _EXPERT_COUNTS if config.get(key)), None)
    if experts is None:
        return frozenset(every), f"no experts, num_hidden_layers = {layers}"
    if config.get("first_k_dense_replace") is not None or "moe_layer_freq" in config:
        return _deepseek(config, every)
    if "decoder_sparse_step" in config or "mlp_only_layers" in config:
        return _qwen(config, every)
    return frozenset(), f"{experts} = {config[experts]} and no key that names dense layers"


def _deepseek(config: Mapping[str, Any], every: range) -> tuple[frozenset[int], str]:
    first = _number(config, "first_k_dense_replace", default=0)
    frequency = config.get("moe_layer_freq", 1)
    reason = f"first_k_dense_replace = {first}, moe_layer_freq = {frequency}"
    if isinstance(frequency, list):
        if len(frequency) < len(every):
            raise SourceError(f"{CONFIG}: moe_layer_freq has {len(frequency)} entries for {len(every)} layers")
        return frozenset(i for i in every if i < first or not frequency[i]), reason
    if type(frequency) is not int or frequency < 1:
        raise SourceError(f"{CONFIG}: moe_layer_freq is {frequency!r}, a number from 1 is wanted")
    return frozenset(i for i in every if i < first or i % frequency != 0), reason


def _qwen(config: Mapping[str, Any], every: range) -> tuple[frozenset[int], str]:
    step = _number(config, "decoder_sparse_step", default=1)
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise SourceError(f"{CONFIG}: mlp_only_layers {only!r} is no list of layer numbers")
    if step < 1:
        raise SourceError(f"{CONFIG}: decoder_sparse_step {step} is no number from 1")
    dense = frozenset(i for i in every if i in only or (i + 1) % step != 0)
    return dense, f"mlp_only_layers = {only}, decoder_sparse_step = {step}"


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 0 or (value == 0 and default is None):
        raise SourceError(f"{CONFIG}: {key} is {value!r}, a whole number is wanted; is it a language model's config?")
    if value > _MAX_SIZE:
        raise SourceError(f"{CONFIG}: {key} is {reprlib.repr(value)}, up to {_MAX_SIZE} are believed")
    return value
