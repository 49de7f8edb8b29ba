"""Values of config.json, checked where they are read."""

import reprlib
from collections.abc import Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.model.naming import CONFIG

_MAX_SIZE = 2**31 - 1  # of a dimension: more is no model's


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number, from 1 where there is no default. Raises SourceError that names the key."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 0 or (value == 0 and default is None):
        raise SourceError(f"{CONFIG}: {key} is {value!r}, a whole number is wanted; is it a language model's config?")
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
