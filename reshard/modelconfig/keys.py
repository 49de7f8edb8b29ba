"""The keys of a language model's config that decide what is cut and computed."""

from reshard.modelconfig.act import ACT_KEYS, is_suspicious
from reshard.modelconfig.families import FAMILIES
from reshard.modelconfig.layers import looks_like_layers
from reshard.modelconfig.mtp import MTP_COUNTS
from reshard.modelconfig.rules import EXPERT_COUNTS, RULES

DENSE_SIZES = (
    "dense_intermediate_size",  # MiniMax M3
    "prefix_dense_intermediate_size",  # Cohere 2 MoE
    "intermediate_size_mlp",  # Llama 4
)
"""A dense layer's own intermediate size, where the key without a prefix is the experts'."""

_OF_FAMILIES = {
    key
    for family in FAMILIES.values()
    for key in (family.bias, family.act, family.act_elsewhere, family.limit, family.limits, *family.defaults)
    if key
}
_KNOWN = frozenset(
    {
        *("num_hidden_layers", "num_layers", "hidden_size", "intermediate_size", "mlp_bias"),
        *DENSE_SIZES,
        *ACT_KEYS,
        *EXPERT_COUNTS,
        *MTP_COUNTS,
        *_OF_FAMILIES,
        *(key for rule in RULES.values() for key in rule.keys),
    }
)


def decides(key: str) -> bool:
    """Whether a key decides anything of the dense layers, or looks as if it did."""
    return key in _KNOWN or is_suspicious(key) or looks_like_layers(key)
