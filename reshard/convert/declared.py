"""What the files beside the weights must say of layers that were converted, or are put together from several sets."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reshard.checkpoint.description import Layer, Linear
from reshard.errors import SchemeError
from reshard.model.naming import CONFIG
from reshard.quantization import DESCRIPTION, key_of_left_alone
from reshard.schemes.declare import description_type, quantization_config
from reshard.schemes.table import FLOAT, SCHEMES, Variant


def declared(config: Mapping[str, Any] | None, layers: Sequence[Layer]) -> dict[str, bytes]:
    """config.json, and ModelSlim's description where that says it, as they are true of these layers and no others.

    config: without quantization. layers: their quantized linears go together. Raises SchemeError where it takes a
    config.json to say it, and there is none.
    """
    variants = quantized(layers)
    types = {variant: kind for variant in variants if (kind := description_type(variant)) is not None}
    section = None
    if variants and not types:
        section = quantization_config(variants[0], list(_patterns(layers)), [])
    floats = [name for name, linear in _linears(layers) if is_float(linear)]
    if section and floats:
        section[key_of_left_alone(section["quant_method"])] = floats
    files: dict[str, bytes] = {}
    if config is not None:
        files[CONFIG] = _json({**config, "quantization_config": section} if section else config)
    elif section is not None:
        raise SchemeError(f"{variants[0].kind} is told by {CONFIG}, which the source lacks; put the model's own there")
    if types:
        named = {
            tensor.stored.name: types.get(linear.variant, FLOAT)
            for _, linear in _linears(layers)
            for tensor in linear.tensors.values()
        }
        files[DESCRIPTION] = _json({"version": "1.0.0", "model_quant_type": types[variants[0]]} | named)
    return files


def quantized(layers: Sequence[Layer]) -> list[Variant]:
    """What their quantized linears are, each once."""
    return list(dict.fromkeys(linear.variant for _, linear in _linears(layers) if not is_float(linear)))


def go_together(one: Variant, other: Variant) -> bool:
    """Whether the files of one tool can say that some linears are the one, and others the other."""
    return one == other or None not in (description_type(one), description_type(other))


def is_float(linear: Linear) -> bool:
    """Whether it is not quantized."""
    return SCHEMES[linear.variant.scheme].is_float


def _linears(layers: Sequence[Layer]) -> Iterator[tuple[str, Linear]]:
    """Names and linears."""
    for layer in layers:
        for role in layer.part.roles:
            yield layer.name(role.name), layer.linears[role.name]


def _patterns(layers: Sequence[Layer]) -> Iterator[str]:
    """compressed-tensors' targets that mean the quantized linears of these layers and no others."""
    alike: dict[tuple[str, ...], list[Layer]] = {}  # by the linears that are quantized
    for layer in layers:
        roles = tuple(role.name for role in layer.part.roles if not is_float(layer.linears[role.name]))
        alike.setdefault(roles, []).append(layer)
    for roles, of_these in alike.items():
        modules = "|".join(re.escape(layer.module) for layer in of_these)
        if roles and of_these[0].part.place.in_layers:
            yield rf"re:({modules})\.({'|'.join(map(re.escape, roles))})$"
        elif roles:
            yield f"re:({modules})$"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
