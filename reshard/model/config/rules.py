"""From the keys of a config to the layers whose MLP is dense: one rule for each way that model families say it.

A rule reads the config's own values and, where a key is absent or null, its family's (reshard.model.config.families).
"""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reshard.errors import SourceError
from reshard.model.config.values import number, per_layer
from reshard.model.naming import CONFIG

Keys = ChainMap[str, Any]
"""The config's own values before its family's."""


class UnknownKindError(Exception):
    """A kind of layer that no rule knows: the keys say something, and it is not understood."""


@dataclass(frozen=True)
class Rule:
    """`leads`: the keys of which one makes it speak. `others`: what it reads beside them. `dense`: the dense layers."""

    leads: tuple[str, ...]
    dense: Callable[[Keys, range], frozenset[int]]
    others: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that it reads."""
        return (*self.leads, *self.others)


def _types(keys: Keys, every: range) -> frozenset[int]:
    kinds = per_layer(keys, "mlp_layer_types", len(every))
    for kind in kinds:
        if not isinstance(kind, str) or not (kind in {"dense", "sparse"} or kind.endswith("moe")):
            raise UnknownKindError(f"mlp_layer_types has {kind!r}; dense, sparse, moe and hash_moe are known")
    return frozenset(i for i in every if kinds[i] == "dense")


def _first(keys: Keys, every: range) -> frozenset[int]:
    """The first layers are dense; behind them, those whose index is no multiple of the frequency."""
    frequency = keys.get("moe_layer_freq", 1)
    if isinstance(frequency, list):  # names each layer: no family's default beside it
        sparse = per_layer(keys, "moe_layer_freq", len(every))
        first = number(keys.maps[0], "first_k_dense_replace", default=0)
        return frozenset(i for i in every if i < first or not sparse[i])
    first = number(keys, "first_k_dense_replace", default=0)
    if type(frequency) is not int or frequency < 1:
        raise SourceError(f"{CONFIG}: moe_layer_freq is {frequency!r}, a number from 1 is wanted")
    return frozenset(i for i in every if i < first or i % frequency != 0)


def _sarvam(keys: Keys, every: range) -> frozenset[int]:
    """As _first, with the frequency counted from the first sparse layer."""
    first, frequency = number(keys, "first_k_dense_replace", default=0), number(keys, "moe_layer_freq")
    return frozenset(i for i in every if i < first or (i - first) % frequency != 0)


def _count(key: str) -> Callable[[Keys, range], frozenset[int]]:
    return lambda keys, every: frozenset(i for i in every if i < number(keys, key, default=0))


def _flags(key: str) -> Callable[[Keys, range], frozenset[int]]:
    """A list with 1 or true for each layer that has experts."""

    def dense(keys: Keys, every: range) -> frozenset[int]:
        flags = per_layer(keys, key, len(every))
        return frozenset(i for i in every if not flags[i])

    return dense


def _listed(key: str) -> Callable[[Keys, range], frozenset[int]]:
    """The layers with experts: a list, or the same as text with commas."""

    def dense(keys: Keys, every: range) -> frozenset[int]:
        value = keys[key]
        items = [item for item in value.split(",") if item.strip()] if isinstance(value, str) else value
        try:
            sparse = {int(item) for item in items}
        except (TypeError, ValueError) as error:
            raise SourceError(f"{CONFIG}: {key} is {value!r}, layer numbers are wanted") from error
        return frozenset(i for i in every if i not in sparse)

    return dense


def _span(keys: Keys, every: range) -> frozenset[int]:
    """ERNIE 4.5: every interval-th layer from start to end has experts. A VL model has one pair for each modality."""
    start = _edge(keys, "moe_layer_start_index", 0, min)
    end = _edge(keys, "moe_layer_end_index", -1, max)
    if end == -1:
        end = len(every) - 1
    interval = number(keys, "moe_layer_interval", default=1)
    if interval < 1:
        raise SourceError(f"{CONFIG}: moe_layer_interval is {interval}, a number from 1 is wanted")
    return frozenset(i for i in every if not (start <= i <= end and (i + 1) % interval == 0))


def _edge(keys: Keys, key: str, default: int, of: Callable[[list[int]], int]) -> int:
    value = keys.get(key)
    values = value if isinstance(value, list) else [default if value is None else value]
    if not values or not all(type(item) is int and item >= -1 for item in values):
        raise SourceError(f"{CONFIG}: {key} is {value!r}, a layer number is wanted")
    return of(values)


def _qwen(keys: Keys, every: range) -> frozenset[int]:
    step = number(keys, "decoder_sparse_step", default=1)
    only = keys.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise SourceError(f"{CONFIG}: mlp_only_layers {only!r} is no list of layer numbers")
    if step < 1:
        raise SourceError(f"{CONFIG}: decoder_sparse_step {step} is no number from 1")
    return frozenset(i for i in every if i in only or (i + 1) % step != 0)


def _interleaved(keys: Keys, every: range) -> frozenset[int]:
    """Llama 4: every step-th layer has experts, none with a step of 0."""
    step = number(keys, "interleave_moe_layer_step", default=0)
    return frozenset(i for i in every if step == 0 or (i + 1) % step != 0)


RULES = {
    "mlp_layer_types": Rule(("mlp_layer_types",), _types),
    "moe_layers": Rule(("moe_layers",), _listed("moe_layers")),
    "moe_layers_enum": Rule(("moe_layers_enum",), _listed("moe_layers_enum")),
    "is_moe_layer": Rule(("is_moe_layer",), _flags("is_moe_layer")),
    "layer_freq": Rule(("layer_freq",), _flags("layer_freq")),
    "first_k_dense_replace": Rule(("first_k_dense_replace", "moe_layer_freq"), _first),
    "num_dense_layers": Rule(("num_dense_layers",), _count("num_dense_layers")),
    # HunYuan's own code; transformers and vLLM pass it over, and build experts in those layers too.
    "moe_layer_num_skipped": Rule(("moe_layer_num_skipped",), _count("moe_layer_num_skipped")),
    "moe_layer_start_index": Rule(
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        _span,
    ),
    "interleave_moe_layer_step": Rule(("interleave_moe_layer_step",), _interleaved),
    "decoder_sparse_step": Rule(("decoder_sparse_step", "mlp_only_layers"), _qwen),
    "first_k_dense_replace, moe_layer_freq from there": Rule(("first_k_dense_replace",), _sarvam, ("moe_layer_freq",)),
    "every layer": Rule((), lambda keys, every: frozenset()),
}
"""By name. A config of an unknown family is read by all whose leading keys it has, in this order."""

FAMILY_ONLY = frozenset({"first_k_dense_replace, moe_layer_freq from there", "every layer"})
"""The rules that keys alone do not call for."""

EXPERT_COUNTS = (
    "n_routed_experts",  # DeepSeek, GLM, Kimi K2
    "num_experts",  # Qwen, Ling, Hunyuan (one number or one for each layer)
    "num_local_experts",  # Mixtral, Llama 4, MiniMax
    "moe_num_experts",  # ERNIE 4.5 (one number, or one for text and one for images), Step
    "num_routed_experts",  # openPangu
)
"""The keys that count a model's routed experts."""
