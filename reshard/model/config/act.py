"""What stands between a dense layer's matrices, by a language model's config."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from reshard import limits
from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard.model.config.families import Family, family_of
from reshard.model.config.rules import RULES
from reshard.model.config.values import limit, per_layer, word, wrong

ALIASES = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_python_tanh": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_accurate": GELU_TANH,
}
"""transformers' names (its ACT2FN) of the functions that are computed; the tests compare each with its own."""

ACT_KEYS = ("hidden_act", "hidden_activation", "activation_function")
_SUSPICIOUS = re.compile(
    r"mlp|ffn|feed_?forward|(?:^|_)ff(?:_|$)|glu|silu|gelu|relu|swish|(?:^|_)act(?:_|$)|act_?fn|activation|nonlinear|"
    r"clip|clamp|softcap|sparsity|(?:^|_)limits?(?:_|$)|(?:max|min)_gate|"
    r"^(?>.*?gate).*(?:cap|max|bound|multiplier)",
    re.IGNORECASE,
)
_STRONG = re.compile(
    r"limit|clamp|clip|cap(?:_|$|ping)|glu|silu|gelu|relu|(?:^|_)act(?:_|$)|act_?fn|activation|sparsity", re.IGNORECASE
)
HARMLESS = {
    "activation_dropout|activation_scheme|chunk_size|checkpoint|gradient|offload": "of training, memory, quantization",
    "fuse|fused|use_fused": "the choice of a kernel, which computes the same (flash-linear-attention)",
    "mlp_bias|ffn_bias|ff_bias": "a bias, which is a tensor of its own and refused by its name",
    "gated_mlp|use_gated_mlp|is_gated_act|use_swiglu_ffn": "a gate, which every layer that is cut has",
    "router|moe|expert|experts|use_mixed_mlp_moe": "of the choice of experts, or of experts alone",
    "attn|attention|qk|qkv|clip_qkv|rope|final_logit|logit|lm_head": "of attention or the output head",
    "linear|mamba|hidden_mamba|ssm|time_step|conv": "of a layer in attention's place",
    "mm|tune_mm|vision|visual|audio|image|video|frames|clip_model|clip_vision": "of other modules than the decoder",
    "projector|projection|adapter|perceiver|resampler": "of what stands between the two",
    "pooler|classifier|summary|mtp|embed|token|max_length|context": "of other modules than the MLP, or of requests",
    "encoder|speech_encoder|t2u": "of an encoder",
}
"""Keys that look as if they changed what a dense layer computes, and do not: how they begin, and why."""
HARMLESS_ENDS = {
    "size|sizes|dim|dims|dim_multiplier|ratio|ratios|mult|multiple_of|expansion": "a size, as the tensors' shapes are",
    "dropout|rate|dtype|loss|range|std|eps": "of training, or of a norm",
}
"""And how they end, where nothing in them names a function or a bound."""


def activations(language: Mapping[str, Any], layers: int) -> tuple[Activation | None, ...]:
    """Of each layer. None where the config does not say it and its family's is not known.

    What changes the layer and is not known is part of the name, so that whatever computes refuses it by that name.
    Raises SourceError where a key makes no sense.
    """
    family = family_of(language)
    if family is not None and family.fixed is not None:
        return (family.fixed,) * layers
    name = _name(language, family)
    known = {*ACT_KEYS, *(key for rule in RULES.values() for key in rule.keys)}
    known |= {*family.keys, *family.ignored} if family is not None else set()
    unknown = [
        f"{key} = {_shown(value)}"
        for key, value in language.items()
        if key not in known and _changes(value) and is_suspicious(key)
    ]
    if unknown and (name is None or Activation(name).is_known):
        return (Activation(" and ".join([*([name] if name else ()), *unknown])),) * layers
    if name is None:
        return (None,) * layers
    clamped = f"{name} {family.clamp}" if family is not None and family.clamp else name
    limits = _limits(language, family, layers) if family is not None else [None] * layers
    return tuple(Activation(name if limit is None else clamped, limit) for limit in limits)


def _name(language: Mapping[str, Any], family: Family | None) -> str | None:
    keys = ACT_KEYS if family is None else (family.act, family.act_elsewhere)
    named = {key: word(language, key) for key in keys if key}
    if empty := next((key for key, name in named.items() if name == ""), None):
        raise wrong(empty, "", "the name of an activation")
    names = {key: ALIASES.get(name, name) for key, name in named.items() if name is not None}
    if family is not None and family.activation is not None:
        own = names.get(family.act, ALIASES[family.activation])
        names[family.act] = family.renamed.get(own, own)
    if len(set(names.values())) > 1:
        return " or ".join(f"{key} {name}" for key, name in sorted(names.items()))
    return next(iter(names.values()), None)


def is_suspicious(key: str) -> bool:
    """Whether a key looks as if it changed what a dense layer computes."""
    if _SUSPICIOUS.search(key) is None:
        return False
    if any(re.match(rf"(?:{words})(?:_|$)", key, re.IGNORECASE) for words in HARMLESS):
        return False
    ends = any(re.search(rf"_(?:{words})$", key, re.IGNORECASE) for words in HARMLESS_ENDS)
    return _STRONG.search(key) is not None or not ends


def _changes(value: object) -> bool:
    """Whether a value does anything: not null, false or 0, nor a list of such."""
    return any(_changes(item) for item in value) if isinstance(value, list) else bool(value)


def _limits(language: Mapping[str, Any], family: Family, layers: int) -> list[float | None]:
    """Of each layer; 0 and null are none."""
    if family.limits is not None and language.get(family.limits) is not None:
        return [limit(value, family.limits) for value in per_layer(language, family.limits, layers)]
    key = family.limit or ""
    return [limit(language.get(key, family.defaults.get(key)), key)] * layers


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= limits.WORD_CHARACTERS else reprlib.repr(value)
