"""Where config.json keeps the language model: at its top, or under a key of its own beside vision and speech."""

from collections.abc import Mapping
from typing import Any

from reshard import limits
from reshard.errors import SourceError
from reshard.model.config.keys import decides, decides_alone, is_of_class
from reshard.model.naming import CONFIG, stands_beside

_LAYERS = "num_hidden_layers"
_TOP = ""
WRAPPERS: dict[tuple[str, ...], str] = {
    ("text_config",): "transformers' own: Kimi K2.5 and K3, GLM-4.5V, Qwen3.5, Llama 4, Mistral 3, Step 3, Gemma 3",
    ("language_config",): "DeepSeek-VL2, DeepSeek-OCR, Janus",
    ("llm_config",): "InternVL, Ovis, Nemotron VL",
    ("thinker_config", "text_config"): "Qwen2.5-Omni, Qwen3-Omni",
    ("thinker_config",): "the same, with the sizes one level up",
}
"""The path of the nested config, and who writes it so."""


def language_levels(config: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """(key, config) of every level that may speak of the language model: the top, whose key is empty, and WRAPPERS'.

    A nested key is spelt with dots: "thinker_config.text_config". Raises SourceError for too many keys.
    """
    found: list[tuple[str, Mapping[str, Any]]] = [(_TOP, config)]
    for path in WRAPPERS:
        nested: Any = config
        for key in path:
            nested = nested.get(key) if isinstance(nested, Mapping) else None
        if isinstance(nested, Mapping):
            found.append((".".join(path), nested))
    for place, level in found:
        if len(level) > limits.CONFIG_KEYS:
            raise SourceError(f"{CONFIG}: {len(level)} keys {_at(place)}, up to {limits.CONFIG_KEYS} are read")
    return tuple(found)


def language_config(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(the key under which the language model's config is nested, that config); (None, config) where it is not.

    Where its sizes stand at the top too (DeepSeek-OCR), the two are one, and not nested. Raises SourceError where
    levels contradict each other, or where a key that decides what is cut stands in another than the one that is read.
    """
    key, language = _read(config)
    if key is not None:
        for place, level in language_levels(config):
            if place != key:
                _check_nothing_lost(place, level, key, language)
    return key, language


def _read(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    sized = [(key, level) for key, level in language_levels(config) if level.get(_LAYERS) is not None]
    nested = [(key, level) for key, level in sized if key != _TOP]
    if not nested:
        return _without_sizes(config) if not sized else (None, dict(config))
    key, language = nested[0]
    for other, level in sized:
        _check_agree(other, level, key, language)
    if sized == nested:
        return key, dict(language)
    given = {name: value for name, value in config.items() if value is not None}
    # The top's model_type names the wrapper.
    return None, {**language, **given, "model_type": language.get("model_type", config.get("model_type"))}


def _without_sizes(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Of a class whose defaults a config need not name; or of a config that is no language model's."""
    if all(isinstance(config.get(key), Mapping) for key in ("encoder", "decoder")):
        raise SourceError(
            f"{CONFIG}: an encoder and a decoder (T5Gemma and its like): this version cuts models that are a decoder "
            "alone; serve this one without denseffn_tensor_parallel_size"
        )
    for key, nested in language_levels(config):
        if key != _TOP and isinstance(nested.get("model_type"), str):
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


def _check_agree(place: str, level: Mapping[str, Any], other_place: str, other: Mapping[str, Any]) -> None:
    for name, value in level.items():
        second = other.get(name)
        if None not in (value, second) and value != second and decides(name):
            raise SourceError(
                f"{CONFIG} contradicts itself: {name} is {value!r} {_at(place)} and {second!r} {_at(other_place)}; "
                "make it the one of the tensors in both"
            )


def _check_nothing_lost(place: str, level: Mapping[str, Any], key: str, language: Mapping[str, Any]) -> None:
    deciding = {name: value for name, value in level.items() if decides_alone(name)}
    _check_agree(place, deciding, key, language)
    for name, value in deciding.items():
        if value is not None and language.get(name) is None and not is_of_class(language, name, value):
            raise SourceError(
                f"{CONFIG}: {name} = {value!r} stands {_at(place)} and not {_at(key)}, where engines read the language "
                f"model's keys: move it into {key}, or take it out if the model was not trained with it"
            )


def _at(place: str) -> str:
    return f"in {place}" if place else "at its top"
