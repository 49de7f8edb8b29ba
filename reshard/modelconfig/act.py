"""What stands between a dense layer's matrices, by a language model's config."""

import re
from collections.abc import Mapping
from typing import Any

from reshard.activation import GELU, GELU_TANH, SILU, Activation
from reshard.errors import SourceError
from reshard.modelconfig.families import Family, family_of
from reshard.modelconfig.values import per_layer
from reshard.naming import CONFIG

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
    r"swiglu|(?:^|_)glu(?:_|$)|(?:^|_)act(?:_|$)|activation|(?:^|_)mlp_(?!layer_types|only_layers|bias|dim)|clamp|softcap"
)
HARMLESS = {
    r"dropout|checkpoint|offload|_dtype": "of training and memory",
    r"logit_softcapping": "of attention's scores and of the head",
    r"router|gate_act|score|expert": "of the choice of experts, or of experts alone",
    r"project|vision|audio|mamba|ssm|conv|attn|attention|linear_act": "of other modules than the MLP",
    r"pooler|classifier|summary|mtp|embed": "of other modules than the MLP",
    r"quant|activation_scheme": "of the quantization",
}
"""Keys that look as if they changed what a dense layer computes, and do not: patterns, and why."""


def activations(language: Mapping[str, Any], layers: int) -> tuple[Activation | None, ...]:
    """Of each layer. None where the config does not say it and its family's is not known.

    What changes the layer and is not known is part of the name, so that whatever computes refuses it by that name.
    Raises SourceError where a key makes no sense.
    """
    family = family_of(language)
    if family is not None and family.fixed is not None:
        return (family.fixed,) * layers
    name = _name(language, family)
    if name is None:
        return (None,) * layers
    unknown = [f"{key} = {language[key]}" for key in _unknown(language, family)]
    if unknown and Activation(name).is_known:
        return (Activation(" and ".join([name, *unknown])),) * layers
    return tuple(_limited(name, limit, family) for limit in _limits(language, family, layers))


def _name(language: Mapping[str, Any], family: Family | None) -> str | None:
    own = (family.act,) if family is not None else ACT_KEYS
    names = {key: _alias(language[key], key) for key in own if language.get(key) is not None}
    if len(set(names.values())) > 1:
        return " or ".join(f"{key} {name}" for key, name in names.items())
    if names:
        return next(iter(names.values()))
    return ALIASES[family.activation] if family is not None and family.activation is not None else None


def _alias(value: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise SourceError(f"{CONFIG}: {key} is {value!r}, the name of an activation is wanted")
    return ALIASES.get(value, value)


def _unknown(language: Mapping[str, Any], family: Family | None) -> list[str]:
    known = {*ACT_KEYS}
    if family is not None:
        known |= {family.act, *family.ignored} | {key for key in (family.limit, family.limits) if key is not None}
    return [key for key, value in language.items() if _changes(value) and key not in known and is_suspicious(key)]


def is_suspicious(key: str) -> bool:
    """Whether a key looks as if it changed what a dense layer computes."""
    return _SUSPICIOUS.search(key) is not None and not any(re.search(pattern, key) for pattern in HARMLESS)


def _changes(value: object) -> bool:
    """Whether a value does anything: not null, false or 0, nor a list of such."""
    return any(_changes(item) for item in value) if isinstance(value, list) else bool(value)


def _limits(language: Mapping[str, Any], family: Family | None, layers: int) -> list[float | None]:
    """Of each layer; 0 and null are none."""
    if family is None:
        return [None] * layers
    if family.limits is not None and language.get(family.limits) is not None:
        return [_limit(value, family.limits) for value in per_layer(language, family.limits, layers)]
    key = family.limit
    if key is None:
        return [None] * layers
    value = language[key] if key in language else family.defaults.get(key)
    return [_limit(value, key)] * layers


def _limit(value: object, key: str) -> float | None:
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise SourceError(f"{CONFIG}: {key} has {value!r}, a number above 0 is wanted")
    return float(value)


def _limited(name: str, limit: float | None, family: Family | None) -> Activation:
    if limit is not None and family is not None and family.clamps_after:
        return Activation(f"{name} clamped behind the activation", limit)
    return Activation(name, limit)
