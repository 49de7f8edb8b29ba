"""Layers of multi-token prediction, which stand behind a model's own and are never DenseFFN."""

from collections.abc import Iterable, Mapping
from typing import Any

from reshard.model.config.values import number

MTP_COUNTS = (
    "num_nextn_predict_layers",  # DeepSeek, GLM, Step
    "num_mtp_layers",  # openPangu, transformers' own name
    "mtp_num_layers",
    "mtp_num_hidden_layers",  # Qwen3.5
    "num_mtp_modules",  # MiniMax M2
)
_MARKS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"})
"""What the MTP layers of DeepSeek, GLM, Step and openPangu have beside attention and MLP, and no other layer has."""


def mtp_layers(language: Mapping[str, Any]) -> int:
    """How many stand behind the last layer, by the first key that counts them."""
    key = next((key for key in MTP_COUNTS if language.get(key) is not None), MTP_COUNTS[0])
    return number(language, key, default=0)


def is_mtp_layer(names: Iterable[str]) -> bool:
    """Whether a layer is an MTP layer, by the names in it: what follows `layers.{i}.`, such as `eh_proj.weight`."""
    return any(name.partition(".")[0] in _MARKS for name in names)
