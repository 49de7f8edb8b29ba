"""Where config.json keeps the language model: at its top, or under a key of its own beside vision and speech."""

from collections.abc import Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.modelconfig.rules import EXPERT_COUNTS, RULES
from reshard.naming import CONFIG, stands_beside

_LAYERS = "num_hidden_layers"
WRAPPERS: dict[tuple[str, ...], str] = {
    ("text_config",): "transformers' own: Kimi K2.5 and K3, GLM-4.5V, Qwen3.5, Llama 4, Mistral 3, Step 3, Gemma 3",
    ("language_config",): "DeepSeek-VL2, DeepSeek-OCR, Janus",
    ("llm_config",): "InternVL, Ovis, Nemotron VL",
    ("thinker_config", "text_config"): "Qwen2.5-Omni, Qwen3-Omni",
    ("thinker_config",): "the same, with the sizes one level up",
}
"""The path of the nested config, and who writes it so."""

_DECIDE = frozenset(
    {_LAYERS, "hidden_size", "intermediate_size", "hidden_act", "hidden_activation", *EXPERT_COUNTS}
) | {key for rule in RULES.values() for key in rule.keys}
"""The keys that may decide what is cut and computed."""


def language_config(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(the key under which the language model's config is nested, that config); (None, config) where it is not.

    A nested key is spelt with dots: "thinker_config.text_config". Where its sizes stand at the top too (DeepSeek-OCR),
    the two are one, and not nested. Raises SourceError where they contradict each other.
    """
    found = {".".join(path): nested for path in WRAPPERS if (nested := _at(config, path)) is not None}
    for key, nested in found.items():
        if nested.get(_LAYERS) is not None:
            if config.get(_LAYERS) is None:
                return key, dict(nested)
            return None, _both(config, key, nested)
    if config.get(_LAYERS) is None:
        _refuse_two_stacks(config)
        for key, nested in found.items():  # of a class whose defaults a config need not name
            if isinstance(nested.get("model_type"), str):
                return key, dict(nested)
        others = [
            key
            for key, value in config.items()
            if isinstance(value, Mapping) and _LAYERS in value and not stands_beside(f"{key}.")
        ]
        if others:
            raise SourceError(
                f"{CONFIG}: no {_LAYERS} at its top; it stands in {', '.join(others)}, of which none is known to be a "
                f"language model's; known are {', '.join('.'.join(path) for path in WRAPPERS)}"
            )
    return None, dict(config)


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any] | None:
    nested: Any = config
    for key in path:
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested if isinstance(nested, Mapping) else None


def _refuse_two_stacks(config: Mapping[str, Any]) -> None:
    if all(isinstance(config.get(key), Mapping) for key in ("encoder", "decoder")):
        raise SourceError(
            f"{CONFIG}: an encoder and a decoder (T5Gemma and its like): this version cuts models that are a decoder "
            "alone; serve this one without denseffn_tensor_parallel_size"
        )


def _both(config: Mapping[str, Any], key: str, nested: Mapping[str, Any]) -> dict[str, Any]:
    """The top with what only the nested config has. model_type is the nested one's: the top's names the wrapper."""
    for name, value in nested.items():
        top = config.get(name)
        if name in _DECIDE and None not in (top, value) and top != value:
            raise SourceError(
                f"{CONFIG} contradicts itself: {name} is {top!r} at its top and {value!r} in {key}; make it the one of "
                "the tensors in both"
            )
    given = {name: value for name, value in config.items() if value is not None}
    return {**nested, **given, "model_type": nested.get("model_type", config.get("model_type"))}
