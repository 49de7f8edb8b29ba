"""Layers of multi-token prediction, which stand behind a model's own and are never DenseFFN."""

from collections.abc import Iterable

_MARKS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"})
"""What DeepSeek's, GLM's and their like's have beside attention and MLP, and no other layer has."""


def is_mtp_layer(names: Iterable[str]) -> bool:
    """Whether a layer is an MTP layer, by the names in it: what follows `layers.{i}.`, such as `eh_proj.weight`."""
    return any(name.partition(".")[0] in _MARKS for name in names)
