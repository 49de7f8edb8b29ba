"""Values of config.json, checked where they are read: each function raises SourceError with key, value, what it may be.

A key that is null is taken for one that is absent, as transformers' classes have it.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from reshard import limits
from reshard.errors import SourceError
from reshard.model.naming import CONFIG


def wrong(key: str, value: object, expected: str) -> SourceError:
    """The error for a value that makes no sense."""
    return SourceError(f"{CONFIG}: {key} is {reprlib.repr(value)}, expected {expected}")


def number(
    config: Mapping[str, Any], key: str, default: int | None = None, least: int | None = None, most: int = limits.SIZE
) -> int:
    """A whole number, from 1 where there is no default."""
    value = default if config.get(key) is None else config[key]
    least = int(default is None) if least is None else least
    if type(value) is not int or not least <= value <= most:
        hint = "; is it a language model's config?" if default is None else ""
        raise wrong(key, value, f"a whole number from {least} to {most}{hint}")
    return value


def numbers(config: Mapping[str, Any], key: str, least: int = 0, most: int = limits.SIZE) -> list[int]:
    """A number, or a list of numbers; none where the key is absent."""
    value = config.get(key)
    if value is None:
        return []
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(type(item) is int and least <= item <= most for item in values):
        raise wrong(key, value, f"a whole number from {least} to {most}, or a list of such")
    return values


def word(config: Mapping[str, Any], key: str) -> str | None:
    """A name, None where the key is absent."""
    value = config.get(key)
    if value is None or (isinstance(value, str) and len(value) <= limits.WORD_CHARACTERS):
        return value
    raise wrong(key, value, f"a name of up to {limits.WORD_CHARACTERS} characters")


def is_set(config: Mapping[str, Any], key: str) -> bool:
    """Whether a flag is; false where the key is absent."""
    return _flag(key, config.get(key) or False)


def limit(value: object, key: str) -> float | None:
    """A bound above 0; 0 and null are none."""
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= limits.SIZE:
        raise wrong(key, value, f"a number above 0, up to {limits.SIZE}")
    return float(value)


def per_layer(config: Mapping[str, Any], key: str, layers: int) -> list[Any]:
    """A list with a value for each layer; values behind the last layer are the MTP layers'."""
    value = config.get(key)
    if not isinstance(value, list):
        raise wrong(key, value, f"a list of {layers} layers")
    if len(value) < layers:
        raise SourceError(f"{CONFIG}: {key} has {len(value)} entries for {layers} layers")
    return value[:layers]


def flags(config: Mapping[str, Any], key: str, layers: int) -> list[bool]:
    """A list with 1 or true, or with 0 or false, for each layer."""
    return [_flag(key, value) for value in per_layer(config, key, layers)]


def layer_numbers(config: Mapping[str, Any], key: str) -> set[int]:
    """Numbers of layers, a list or text with commas; none where the key is absent."""
    value = given = config.get(key, [])
    if isinstance(given, str):
        value = [_from_text(item.strip()) for item in given.split(",") if item.strip()]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise wrong(key, given, "layer numbers")
    return set(value)


def _flag(key: str, value: object) -> bool:
    if value not in (True, False):  # 1 and 0 are equal to them
        raise wrong(key, value, "true or false, or 1 or 0")
    return bool(value)


def _from_text(item: str) -> int | str:
    return int(item) if item.isdecimal() and len(item) <= len(str(limits.LAYERS)) else item
