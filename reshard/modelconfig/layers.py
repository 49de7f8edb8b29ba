"""Which layers are dense, by a language model's config."""

from collections.abc import Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.modelconfig.experts import experts_key
from reshard.modelconfig.values import number
from reshard.naming import CONFIG


def dense_layers(config: Mapping[str, Any], layers: int) -> tuple[frozenset[int], str]:
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
    experts = experts_key(config)
    if experts is None:
        return frozenset(every), f"no experts, num_hidden_layers = {layers}"
    if config.get("first_k_dense_replace") is not None or "moe_layer_freq" in config:
        return _deepseek(config, every)
    if "decoder_sparse_step" in config or "mlp_only_layers" in config:
        return _qwen(config, every)
    return frozenset(), f"{experts} = {config[experts]} and no key that names dense layers"


def _deepseek(config: Mapping[str, Any], every: range) -> tuple[frozenset[int], str]:
    first = number(config, "first_k_dense_replace", default=0)
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
    step = number(config, "decoder_sparse_step", default=1)
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise SourceError(f"{CONFIG}: mlp_only_layers {only!r} is no list of layer numbers")
    if step < 1:
        raise SourceError(f"{CONFIG}: decoder_sparse_step {step} is no number from 1")
    dense = frozenset(i for i in every if i in only or (i + 1) % step != 0)
    return dense, f"mlp_only_layers = {only}, decoder_sparse_step = {step}"
