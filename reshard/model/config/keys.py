"""The keys of a language model's config that decide what is cut and computed."""

from collections.abc import Mapping
from typing import Any

from reshard.model.config.act import ACT_KEYS, ALIASES, is_suspicious
from reshard.model.config.families import FAMILIES, family_of
from reshard.model.config.layers import looks_like_layers
from reshard.model.config.rules import EXPERT_COUNTS, MTP_COUNTS, RULES
from reshard.model.naming import stands_beside

DENSE_SIZES = (
    "dense_intermediate_size",  # MiniMax M3
    "prefix_dense_intermediate_size",  # Cohere 2 MoE
    "intermediate_size_mlp",  # Llama 4
)
"""A dense layer's own intermediate size, where the key without a prefix is the experts'."""

_SIZES = {"num_hidden_layers", "num_layers", "hidden_size", "intermediate_size", *DENSE_SIZES}
_KNOWN = {*_SIZES, "mlp_bias", *ACT_KEYS, *EXPERT_COUNTS, *MTP_COUNTS}
_KNOWN.update(key for family in FAMILIES.values() for key in (family.bias, *family.keys, *family.defaults))
_KNOWN.update(key for rule in RULES.values() for key in rule.keys)


def decides(key: str) -> bool:
    """Whether a key decides anything of the dense layers, or looks as if it did."""
    return key in _KNOWN or is_suspicious(key) or looks_like_layers(key)


def decides_alone(key: str) -> bool:
    """Whether a key decides what the tensors' shapes do not tell.

    One that only looks so is not taken for the language model's where its name is that of a tower.
    """
    return decides(key) and key not in _SIZES and (key in _KNOWN or not stands_beside(f"{key}."))


def is_of_class(language: Mapping[str, Any], key: str, value: object) -> bool:
    """Whether a key that a language model's config lacks would change nothing with this value.

    It is the default of the family's class, nothing that the class reads, or says nothing by itself.
    """
    family = family_of(language)
    items = value if isinstance(value, list) else [value or None]  # [0] may name a layer
    says = any(item is not None and item is not False for item in items)
    if family is None:
        return not says
    fixed = family.fixed is not None and (key in ACT_KEYS or is_suspicious(key))
    if fixed or key in family.ignored or key in {*ACT_KEYS} - {family.act, family.act_elsewhere}:
        return True
    if key == family.act and family.activation is not None:
        return isinstance(value, str) and ALIASES.get(value, value) == ALIASES[family.activation]
    return value == family.defaults[key] if key in family.defaults else not says
