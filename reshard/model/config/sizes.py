"""The sizes of transformers' config classes, where a nested config leaves them out.

A wrapper's save_pretrained writes of its text_config only what differs from the class's defaults (LLaVA 1.5,
DeepSeek-VL).
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from reshard.errors import SourceError
from reshard.model.config.values import word
from reshard.model.naming import CONFIG
from reshard.model.parts import DENSE_FFN

_KEYS = ("num_hidden_layers", *DENSE_FFN.sizes)


@cache
def default_sizes() -> dict[str, dict[str, int]]:
    """By model_type, by key."""
    table = tomllib.loads((files(__package__) / "default_sizes.toml").read_text(encoding="utf-8"))
    return {name: dict(zip(_KEYS, sizes, strict=True)) for names, sizes in table.items() for name in names.split()}


def with_default_sizes(nested: Mapping[str, Any], wrapper: str) -> tuple[dict[str, Any], str | None]:
    """(a nested config with its class's sizes where it has none, a line that names them).

    Raises SourceError where the class's are not known.
    """
    absent = [key for key in _KEYS if nested.get(key) is None]
    if not absent:
        return dict(nested), None
    model_type = word(nested, "model_type")
    defaults = default_sizes().get(model_type or "", {})
    unknown = [key for key in absent if key not in defaults and key != DENSE_FFN.size]
    if unknown:
        raise SourceError(
            f"{CONFIG}: {wrapper} has no {' and no '.join(unknown)}, and the defaults of model_type {model_type!r} are "
            "not known here; write the model's there"
        )
    taken = {key: defaults[key] for key in absent if key in defaults}
    if not taken:
        return dict(nested), None
    said = ", ".join(f"{key} {value}" for key, value in taken.items())
    return {**nested, **taken}, f"{CONFIG}: {wrapper} does not say {said}: the defaults of {model_type} are taken"
