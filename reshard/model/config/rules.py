"""From the keys of a config to the layers whose MLP is dense: one rule for each way that model families say it.

A rule reads the config's own values and, where a key is absent or null, its family's (reshard.model.config.families).
"""

import reprlib
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reshard import limits
from reshard.model.config.values import flags, layer_numbers, number, numbers, per_layer

Keys = ChainMap[str, Any]
"""The config's own values before its family's."""
Dense = frozenset[int]
"""The dense layers."""


class UnknownKindError(Exception):
    """A kind of layer that no rule knows: the keys say something, and it is not understood."""


@dataclass(frozen=True)
class Rule:
    """`leads`: the keys of which one makes it speak. `others`: what it reads beside them. `dense`: the dense layers."""

    leads: tuple[str, ...]
    dense: Callable[[Keys, range], Dense]
    others: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that it reads."""
        return (*self.leads, *self.others)


def _types(keys: Keys, every: range) -> Dense:
    kinds = per_layer(keys, "mlp_layer_types", len(every))
    for kind in kinds:
        if not isinstance(kind, str) or not (kind in {"dense", "sparse"} or kind.endswith("moe")):
            raise UnknownKindError(
                f"mlp_layer_types has {reprlib.repr(kind)}; dense, sparse, moe and hash_moe are known"
            )
    return frozenset(i for i in every if kinds[i] == "dense")


def _first(keys: Keys, every: range) -> Dense:
    """The first layers are dense; behind them, those whose index is no multiple of the frequency."""
    if isinstance(keys.get("moe_layer_freq"), list):  # names each layer: no family's default beside it
        sparse = flags(keys, "moe_layer_freq", len(every))
        first = number(keys.maps[0], "first_k_dense_replace", default=0)
        return _where_not(sparse) | frozenset(every[:first])
    first = number(keys, "first_k_dense_replace", default=0)
    frequency = number(keys, "moe_layer_freq", default=1, least=1)
    return frozenset(i for i in every if i < first or i % frequency != 0)


def _where_not(flags_by_layer: list[bool]) -> Dense:
    return frozenset(i for i, flag in enumerate(flags_by_layer) if not flag)


def _sarvam(keys: Keys, every: range) -> Dense:
    """As _first, with the frequency counted from the first sparse layer."""
    first, frequency = number(keys, "first_k_dense_replace", default=0), number(keys, "moe_layer_freq")
    return frozenset(i for i in every if i < first or (i - first) % frequency != 0)


def _count(key: str) -> Rule:
    return Rule((key,), lambda keys, every: frozenset(every[: number(keys, key, default=0)]))


def _flags(key: str) -> Rule:
    """A list with 1 or true for each layer that has experts."""
    return Rule((key,), lambda keys, every: _where_not(flags(keys, key, len(every))))


def _listed(key: str) -> Rule:
    """The layers with experts."""
    return Rule((key,), lambda keys, every: frozenset(every) - layer_numbers(keys, key))


def _span(keys: Keys, every: range) -> Dense:
    """ERNIE 4.5: every interval-th layer from start to end has experts. A VL model has one pair for each modality."""
    start = _edge(keys, "moe_layer_start_index", 0, min)
    end = _edge(keys, "moe_layer_end_index", -1, max)
    last = every[-1] if end == -1 else end
    interval = number(keys, "moe_layer_interval", default=1, least=1)
    return frozenset(i for i in every if not (start <= i <= last and (i + 1) % interval == 0))


def _edge(keys: Keys, key: str, default: int, of: Callable[[list[int]], int]) -> int:
    return of(numbers(keys, key, least=-1) or [default])


def _qwen(keys: Keys, every: range) -> Dense:
    step = number(keys, "decoder_sparse_step", default=1, least=1)
    only = layer_numbers(keys, "mlp_only_layers")
    return frozenset(i for i in every if i in only or (i + 1) % step != 0)


def _interleaved(keys: Keys, every: range) -> Dense:
    """Llama 4: every step-th layer has experts, none with a step of 0."""
    step = number(keys, "interleave_moe_layer_step", default=0)
    return frozenset(i for i in every if step == 0 or (i + 1) % step != 0)


RULES = {
    "mlp_layer_types": Rule(("mlp_layer_types",), _types),
    "moe_layers": _listed("moe_layers"),
    "moe_layers_enum": _listed("moe_layers_enum"),
    "is_moe_layer": _flags("is_moe_layer"),
    "layer_freq": _flags("layer_freq"),
    "first_k_dense_replace": Rule(("first_k_dense_replace", "moe_layer_freq"), _first),
    "num_dense_layers": _count("num_dense_layers"),
    # HunYuan's own code; transformers and vLLM pass it over, and build experts in those layers too.
    "moe_layer_num_skipped": _count("moe_layer_num_skipped"),
    "moe_layer_start_index": Rule(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _span),
    "interleave_moe_layer_step": Rule(("interleave_moe_layer_step",), _interleaved),
    "decoder_sparse_step": Rule(("decoder_sparse_step", "mlp_only_layers"), _qwen),
    "first_k_dense_replace, moe_layer_freq from there": Rule(("first_k_dense_replace",), _sarvam, ("moe_layer_freq",)),
    "every layer": Rule((), lambda keys, every: frozenset()),
}
"""By name. A config of an unknown family is read by all whose leading keys it has, in this order."""

FAMILY_ONLY = frozenset({"first_k_dense_replace, moe_layer_freq from there", "every layer"})
"""The rules that keys alone do not call for."""

EXPERT_COUNTS = {
    "n_routed_experts": True,  # DeepSeek, GLM, Kimi K2
    "num_experts": True,  # Qwen, Ling, Hunyuan (one number or one for each layer)
    "num_local_experts": False,  # Mixtral, Llama 4, MiniMax
    "moe_num_experts": False,  # ERNIE 4.5 (one number, or one for text and one for images), Step
    "num_routed_experts": False,  # openPangu
}
"""The keys that count a model's routed experts, and whether it is known what those are called (mlp.experts.{e})."""


def expert_counts(language: Mapping[str, Any]) -> dict[str, int]:
    """What a language model's config has of them, null and 0 too: of a list the most."""
    counts = {key: numbers(language, key, most=limits.EXPERTS) for key in EXPERT_COUNTS if key in language}
    return {key: max(found, default=0) for key, found in counts.items()}


def experts_key(language: Mapping[str, Any], *, named: bool = False) -> str | None:
    """The key that counts a language model's routed experts, None for a model without.

    named: only of experts whose names are known.
    """
    counts = expert_counts(language).items()
    return next((key for key, count in counts if count and (EXPERT_COUNTS[key] or not named)), None)


MTP_COUNTS = (
    "num_nextn_predict_layers",  # DeepSeek, GLM, Step
    "num_mtp_layers",  # openPangu, transformers' own name
    "mtp_num_layers",
    "mtp_num_hidden_layers",  # Qwen3.5
    "num_mtp_modules",  # MiniMax M2
)
"""The keys that count the MTP layers behind a model's own, which are never DenseFFN."""


def count_mtp_layers(language: Mapping[str, Any]) -> int:
    """How many there are, by the first key that counts them."""
    counts = (number(language, key, 0, most=limits.LAYERS) for key in MTP_COUNTS if language.get(key) is not None)
    return next(counts, 0)
