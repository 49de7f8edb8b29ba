"""What the cut needs of config.json."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reshard import limits
from reshard.errors import LayersError, SourceError
from reshard.model.activation import Activation
from reshard.model.config.act import activations
from reshard.model.config.families import FAMILIES, family_of
from reshard.model.config.keys import DENSE_SIZES
from reshard.model.config.layers import Account, dense_layers, unknown_keys
from reshard.model.config.rules import count_mtp_layers, expert_counts, experts_key
from reshard.model.config.sizes import with_default_sizes
from reshard.model.config.values import is_set, number, word
from reshard.model.config.wrapper import language_config, language_levels
from reshard.model.naming import CONFIG

# Other names of it: Phi-3-small, Falcon, LFM2, ChatGLM, T5.
_WIDTH = re.compile(r"(?:^|_)(?:ff|ffn|inner|feed_?forward)(?:_hidden|_intermediate)?_(?:size|dim)$|^d_ff$|^n_inner$")


@dataclass(frozen=True)
class ModelConfig:
    """The language model's own: sizes, dense layers, what those compute.

    dense_layers: None where no key that is known says them, and the tensors' names decide. reason: the keys that make
    the layers dense, or why none does. is_stated: whether a key that is known says it; where it follows from the
    absence of keys that are known, names that say otherwise are believed. other_accounts: what other keys say.
    vocab_size, attention_size (all heads' values: o_proj's in_features): 0 where config.json does not say them, or the
    family's code is not known. tied: whether the LM head is the embedding; None where two levels differ on it.
    wrapper: the key under which the language model's config is nested. activations: of each layer; None where
    config.json does not say it and the family's default is not known. doubts: what only tensors can settle, a line
    each, for whoever has a config alone. bias: the key that gives the dense layers' matrices a bias, where one does.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    attention_size: int
    tied: bool | None
    mtp_layers: int
    dense_layers: frozenset[int] | None
    reason: str
    is_stated: bool = True
    other_accounts: tuple[Account, ...] = ()
    wrapper: str | None = None
    activations: tuple[Activation | None, ...] = ()
    doubts: tuple[str, ...] = ()
    bias: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether the family's code was read."""
        return self.model_type in FAMILIES

    def activation(self, layer: int | None) -> Activation | None:
        """What stands between a dense layer's matrices; None where that is not known."""
        return self.activations[layer] if layer is not None and layer < len(self.activations) else None


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the whole of config.json. Raises SourceError naming the key that is missing or makes no sense."""
    wrapper, language = language_config(config)
    taken = None
    if wrapper is not None:
        language, taken = with_default_sizes(language, wrapper)
    # LongCat's and ChatGLM's config.json have another key.
    other = "num_layers" in language and "num_hidden_layers" not in language
    layers = number(language, "num_layers" if other else "num_hidden_layers", most=limits.LAYERS)
    account, others = dense_layers(language, layers)
    between = activations(language, layers)
    family = family_of(language)
    bias = family.bias if family is not None else "mlp_bias"
    return ModelConfig(
        model_type=word(language, "model_type") or "",
        hidden_size=number(language, "hidden_size"),
        intermediate_size=_intermediate_size(language, needed=account.layers != frozenset()),
        num_hidden_layers=layers,
        vocab_size=_if_said(language, "vocab_size"),
        attention_size=_attention_size(language),
        tied=_tied(config),
        mtp_layers=count_mtp_layers(language),
        dense_layers=account.layers,
        reason=account.reason,
        is_stated=account.stated,
        other_accounts=others,
        wrapper=wrapper,
        activations=between,
        doubts=(*([taken] if taken else ()), *_doubts(language, account, others, between)),
        bias=bias if is_set(language, bias) else None,
    )


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model has MoE layers, by the keys that count them: an engine asks no more, and one counts.

    config: the whole of config.json.
    """
    language = language_config(config)[1]
    family = family_of(language)
    default = family is not None and bool(family.rules)
    return experts_key(language) is not None if expert_counts(language) else default


def known_dense_layers(model: ModelConfig) -> frozenset[int]:
    """The dense layers by the config alone. Raises LayersError where it takes the tensors' names to say them."""
    if model.dense_layers is None:
        raise LayersError(
            f"{CONFIG}: {model.reason}: which layers are dense is not known without the tensors' names; give the "
            "checkpoint, its headers are enough"
        )
    return model.dense_layers


def _intermediate_size(language: Mapping[str, Any], *, needed: bool) -> int:
    """Of a dense layer: by a key of its own where there is one. 0 where no layer is dense and no key is there."""
    family = family_of(language)
    defaults = family.defaults if family is not None else {}
    for key in DENSE_SIZES:
        if language.get(key) is not None or key in defaults:
            return number(language, key, default=defaults.get(key), least=1)
    sizes = language.get("intermediate_size")
    if isinstance(sizes, list) and sizes:
        if len(set(map(str, sizes))) > 1:
            raise SourceError(f"{CONFIG}: intermediate_size differs from layer to layer: such a model is not cut")
        return number({"intermediate_size": sizes[0]}, "intermediate_size")
    if sizes is None and needed:
        _explain_width(language)
    return number(language, "intermediate_size", default=None if needed else 0)


def _if_said(language: Mapping[str, Any], key: str) -> int:
    """A size from 1; 0 where the key is absent."""
    return 0 if language.get(key) is None else number(language, key)


def _tied(config: Mapping[str, Any]) -> bool | None:
    """As one level or all say; which of two that differ an engine goes by depends on its version."""
    key = "tie_word_embeddings"
    said = {is_set(level, key) for _, level in language_levels(config) if level.get(key) is not None}
    return None if len(said) > 1 else said == {True}


def _attention_size(language: Mapping[str, Any]) -> int:
    """Heads times the size of one's values: of latent attention (DeepSeek's MLA) that has a key of its own."""
    heads = _if_said(language, "num_attention_heads")
    if family_of(language) is None or not heads:
        return 0
    if language.get("kv_lora_rank") is not None:
        return heads * _if_said(language, "v_head_dim")
    return heads * number(language, "head_dim", default=number(language, "hidden_size") // heads)


def _explain_width(language: Mapping[str, Any]) -> None:
    """Raises SourceError where other keys stand in the place of intermediate_size."""
    if isinstance(language.get("block_configs"), list):
        raise SourceError(f"{CONFIG}: block_configs gives each layer a width of its own: such a model is not cut")
    near = [f"{key} = {value}" for key, value in language.items() if type(value) is int and _WIDTH.search(key)]
    if near:
        raise SourceError(
            f"{CONFIG}: no intermediate_size, but {', '.join(near)}; where that is the dense layers' width, write "
            "intermediate_size with it there"
        )


def _doubts(
    language: Mapping[str, Any],
    account: Account,
    others: tuple[Account, ...],
    between: tuple[Activation | None, ...],
) -> Iterator[str]:
    if family_of(language) is None:
        unknown = unknown_keys(language)
        keys = f", nor {', '.join(unknown)}" if unknown else ""
        yield (
            f"{CONFIG}: model_type {language.get('model_type')!r} is not known here{keys}: which layers are dense "
            f"({account.reason}) is not sure without the tensors' names"
        )
    if None in between:
        yield f"{CONFIG} does not name the activation (hidden_act)"
    for other in others:
        yield f"{CONFIG} contradicts itself on the dense layers: {account.reason}, but {other.reason}"
