"""Values of config.json, checked where they are read."""

import reprlib
from collections.abc import Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.model.naming import CONFIG

_MAX_SIZE = 2**31 - 1  # of a dimension: more is no model's


def number(config: Mapping[str, Any], key: str, default: int | None = None, least: int | None = None) -> int:
    """A whole number, from 1 where there is no default. Raises SourceError that names the key."""
    value = default if config.get(key) is None else config[key]
    least = int(default is None) if least is None else least
    if type(value) is not int or value < least:
        hint = "; is it a language model's config?" if default is None else ""
        raise SourceError(f"{CONFIG}: {key} is {value!r}, expected a whole number from {least}{hint}")
    if value > _MAX_SIZE:
        raise SourceError(f"{CONFIG}: {key} is {reprlib.repr(value)}, up to {_MAX_SIZE} are believed")
    return value


def per_layer(config: Mapping[str, Any], key: str, layers: int) -> list[Any]:
    """A list with a value for each layer; values behind the last layer are the MTP layers'. Raises SourceError."""
    value = config.get(key)
    if not isinstance(value, list):
        raise SourceError(f"{CONFIG}: {key} is not a list of {layers} layers")
    if len(value) < layers:
        raise SourceError(f"{CONFIG}: {key} has {len(value)} entries for {layers} layers")
    return value[:layers]


def layer_numbers(config: Mapping[str, Any], key: str) -> set[int]:
    """Numbers of layers, a list or text with commas; none where the key is absent. Raises SourceError."""
    value = given = config.get(key, [])
    if isinstance(given, str):
        value = [int(item) if item.strip().isdecimal() else item for item in given.split(",") if item.strip()]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise SourceError(f"{CONFIG}: {key} is {given!r}, expected layer numbers")
    return set(value)
