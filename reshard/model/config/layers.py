"""Which layers are dense, by a language model's config: what its keys say, and how sure that is."""

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.model.config.families import Family, family_of
from reshard.model.config.rules import (
    EXPERT_COUNTS,
    FAMILY_ONLY,
    RULES,
    Dense,
    Keys,
    Rule,
    UnknownKindError,
    expert_counts,
    experts_key,
)

# Keys that may say which layers are dense, and those that are known to say other things: sizes, counts, routing.
_LOOKS_LIKE_LAYERS = re.compile(r"expert|moe|dense|sparse", re.IGNORECASE)
_OF_EXPERTS = re.compile(
    r"shared|intermediate|hidden_size|ffn_hidden|latent|inner_dim|router|routing|loss|capacity|jitter|dropout|"
    r"scaling|score|group|bias|norm|dtype|kernel|per_tok|topk|top_k|_k$|token|attention|attn|index|parallel|swiglu|"
    r"implementation|quant|mtp|redundant|zero_expert",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Account:
    """What keys say. layers: None where no key that is known says it. reason: the keys, or what is not known.

    stated: a key says it, or the family's code; not where it follows from the absence of keys that are known.
    """

    layers: Dense | None
    reason: str
    stated: bool = True


def dense_layers(language: Mapping[str, Any], layers: int) -> tuple[Account, tuple[Account, ...]]:
    """The account of the keys, and what other keys of the config say that is not the same.

    Raises SourceError where a key makes no sense.
    """
    every = range(layers)
    family = family_of(language)
    if family is not None and family.names:
        return Account(frozenset(), f"{language['model_type']}: its layers are named {family.names}", False), ()
    if _without_experts(language, family):
        keys = ", ".join(f"{key} = {language[key]}" for key in expert_counts(language)) or "no experts"
        return Account(frozenset(every), f"{keys}, num_hidden_layers = {layers}", family is not None), ()
    first, *others = list(_accounts(language, family, every)) or [_unsaid(language)]
    return first, tuple(other for other in others if other.layers not in (None, first.layers))


def _without_experts(language: Mapping[str, Any], family: Family | None) -> bool:
    """Whether the keys make a model without experts, as far as they are known."""
    counts = expert_counts(language)
    if counts:
        most = max(counts.values())
        return most == 0 or (most == 1 and family is not None and (family.one_expert_is_dense or not family.rules))
    if family is not None:
        return not family.rules
    leads = (language.get(key) for rule in RULES.values() for key in rule.leads)
    return all(value is None or value in (0, 1, []) for value in leads) and not unknown_keys(language)


def _accounts(language: Mapping[str, Any], family: Family | None, every: range) -> Iterator[Account]:
    """Every rule's whose keys are there, the family's own before others'; its defaults where it has no key of them.

    mlp_layer_types names each layer, and goes before all others.
    """
    own = ("mlp_layer_types", *(family.rules if family is not None else ()))
    defaults = dict(family.defaults) if family is not None else {}
    given = {key: value for key, value in language.items() if value is not None}
    read = {key for name in own for key in RULES[name].keys}
    others = (name for name, rule in RULES.items() if name not in FAMILY_ONLY and not read.issuperset(rule.leads))
    led = [name for name in (*own, *others) if any(_says(key, given) for key in RULES[name].leads)]
    if not any(name in own for name in led):
        falls_back = (n for n in own if not RULES[n].leads or not defaults.keys().isdisjoint(RULES[n].leads))
        led = [*falls_back][:1] + led
    for name in led:
        yield _account(RULES[name], ChainMap(given, *([defaults] if name in own else [])), every, language)


def _says(key: str, given: Mapping[str, Any]) -> bool:
    """Whether a key's value says anything: a frequency of 1 is every layer behind the dense ones."""
    return key in given and not (key == "moe_layer_freq" and given[key] == 1 and given[key] is not True)


def _account(rule: Rule, keys: Keys, every: range, language: Mapping[str, Any]) -> Account:
    model_type = language.get("model_type")
    try:
        layers = rule.dense(keys, every)
    except UnknownKindError as error:
        return Account(None, str(error))
    if not rule.keys:
        return Account(layers, f"{model_type}: every layer is a MoE layer")
    said = []
    for key in rule.keys:
        if key in keys.maps[0]:
            said.append(key if isinstance(keys[key], list) and len(keys[key]) > 8 else f"{key} = {keys[key]}")
        elif key in keys:
            state = "null" if key in language else "absent"
            said.append(f"{key} is {state}, {model_type} then has {keys[key]}")
    return Account(layers, ", ".join(said))


def _unsaid(language: Mapping[str, Any]) -> Account:
    """Experts, and no key that is known to say in which layers."""
    unknown, counted = unknown_keys(language), experts_key(language)
    what = f"{counted} = {language[counted]}" if counted is not None else f"model_type {language.get('model_type')!r}"
    if unknown:
        return Account(None, f"{what}, and {', '.join(unknown)} is not known")
    nulls = [key for rule in RULES.values() for key in rule.leads if key in language and language[key] is None]
    null = f" ({', '.join(dict.fromkeys(nulls))} is null)" if nulls else ""
    return Account(None, f"{what} and no key that names dense layers{null}")


def unknown_keys(language: Mapping[str, Any]) -> list[str]:
    """Keys that look as if they said which layers are dense and that no rule knows."""
    known = {key for rule in RULES.values() for key in rule.keys} | set(EXPERT_COUNTS)
    return [key for key, value in language.items() if value and key not in known and looks_like_layers(key)]


def looks_like_layers(key: str) -> bool:
    """Whether a key may say which layers are dense."""
    return _LOOKS_LIKE_LAYERS.search(key) is not None and _OF_EXPERTS.search(key) is None
