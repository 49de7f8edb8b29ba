"""config.json of the synthetic model: the real one's, scaled down and cut to its first layers."""

from collections.abc import Mapping
from fractions import Fraction
from math import floor, isqrt
from typing import Any

from reshard.errors import UsageError
from reshard.model.config import experts_key, read_model_config
from reshard.model.config.values import number

_TILE = 16  # sizes of matrices stay whole tiles of the matrix units
_SCALED = {
    "hidden_size": _TILE,
    "intermediate_size": 8 * _TILE,  # whole tiles over eight ranks
    "moe_intermediate_size": _TILE,
    "shared_expert_intermediate_size": _TILE,
    "q_lora_rank": _TILE,
    "kv_lora_rank": _TILE,
    "vocab_size": _TILE,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "index_n_heads": 1,
}
"""What is scaled, and what it stays a multiple of."""
_PER_LAYER = ("mlp_layer_types", "layer_types", "moe_layer_freq")


def shrink(config: Mapping[str, Any], scale: Fraction, layers: int | None) -> dict[str, Any]:
    """The config with its sizes scaled and only its first layers. Raises UsageError where that cannot be."""
    if not 0 < scale <= 1:
        raise UsageError(f"scale {scale}: expected a fraction above 0 and up to 1, such as 1/16")
    shrunk = dict(config)
    if layers is not None:
        _keep_layers(shrunk, layers)
    if scale != 1:
        _scale(shrunk, scale)
    return shrunk


def _keep_layers(config: dict[str, Any], layers: int) -> None:
    before = read_model_config(config).num_hidden_layers
    if not 1 <= layers <= before:
        raise UsageError(f"layers {layers}: the model has {before}; give a number from 1 to {before}")
    config["num_hidden_layers"] = layers
    if type(config.get("first_k_dense_replace")) is int:
        # Not above the number of layers: the MTP layer behind them is a mixture of experts.
        config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers)
    if isinstance(config.get("mlp_only_layers"), list):
        config["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer in range(layers)]
    for key in _PER_LAYER:
        if isinstance(config.get(key), list):  # some lists go on with the MTP layers
            config[key] = [*config[key][:layers], *config[key][before:]]


def _scale(config: dict[str, Any], scale: Fraction) -> None:
    if config.get("kv_lora_rank") is None and config.get("head_dim") is None:
        # Heads get fewer, not smaller; so their size no longer follows from the two others.
        config["head_dim"] = number(config, "hidden_size") // number(config, "num_attention_heads")
    for key, multiple in _SCALED.items():
        if config.get(key) is not None:
            config[key] = _scaled(number(config, key), scale, multiple)
    heads = number(config, "num_attention_heads")
    if config.get("num_key_value_heads") is not None:
        config["num_key_value_heads"] = _divisor(heads, config["num_key_value_heads"])
    _scale_experts(config, scale)
    last = number(config, "vocab_size") - 1
    for key, value in config.items():
        if key.endswith("_token_id") and type(value) is int:
            config[key] = min(value, last)
        elif key.endswith("_token_id") and isinstance(value, list):
            config[key] = [min(token, last) if type(token) is int else token for token in value]


def _scale_experts(config: dict[str, Any], scale: Fraction) -> None:
    key = experts_key(config, named=True)
    if key is None:
        return
    before = number(config, key)
    experts = config[key] = min(before, max(2, _scaled(before, scale)))
    reachable = experts
    if config.get("n_group") is not None:
        # A group is chosen by its two best experts.
        groups = config["n_group"] = _divisor(experts, min(number(config, "n_group"), max(1, experts // 2)))
        if config.get("topk_group") is not None:
            config["topk_group"] = min(number(config, "topk_group"), groups)
            reachable = config["topk_group"] * experts // groups
    if config.get("num_experts_per_tok") is not None:
        config["num_experts_per_tok"] = min(number(config, "num_experts_per_tok"), reachable)


def _scaled(value: int, scale: Fraction, multiple: int = 1) -> int:
    """The nearest multiple, at least one."""
    return multiple * max(1, floor(value * scale / multiple + Fraction(1, 2)))


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return max(divisor for one in small for divisor in (one, number // one) if divisor <= most)
