"""Whether a model has expert layers, by the keys that count them."""

from collections.abc import Mapping
from typing import Any

from reshard.modelconfig.wrapper import language_config

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model has expert layers: an engine asks no more. config: the whole of config.json."""
    return experts_key(language_config(config)[1]) is not None


def experts_key(language: Mapping[str, Any]) -> str | None:
    """The key that counts a language model's routed experts, None for a model without."""
    return next((key for key in EXPERT_COUNTS if language.get(key)), None)
