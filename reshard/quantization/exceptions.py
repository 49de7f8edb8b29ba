"""Modules that a quantization_config leaves alone: by method, the key that lists them and how its entries match.

Whatever a whole checkpoint is quantized with, a dense layer that is left alone holds plain weights, and those are cut.
"""

from collections.abc import Callable, Mapping
from typing import Any

from reshard.model.naming import GATE, GATE_UP, UP
from reshard.quantization.names import Match, at_boundary, component, contained, exact, mentions, names_of, wildcard
from reshard.quantization.section import Section

_Lists = tuple[tuple[str, Match], ...]

_TRANSFORMERS: _Lists = (("modules_to_not_convert", at_boundary), ("ignored_layers", at_boundary))
_EVERY: _Lists = (
    *_TRANSFORMERS,
    ("ignore", wildcard),
    ("exclude_modules", wildcard),
    ("exclude", wildcard),
    ("llm_int8_skip_modules", component),
    ("skip_modules", component),
)

LISTS: Mapping[str, _Lists] = {
    "fp8": _TRANSFORMERS,
    "blockwise_int8": _TRANSFORMERS,
    "w8a8_int8": (("ignore", exact),),
    "compressed-tensors": (("ignore", exact),),
    "modelopt": (("ignore", wildcard), ("exclude_modules", wildcard)),
    "quark": (("exclude", wildcard),),
    "awq": (("modules_to_not_convert", contained),),
    "bitsandbytes": (("llm_int8_skip_modules", component), ("modules_to_not_convert", component)),
    "hqq": (("skip_modules", component), ("modules_to_not_convert", at_boundary)),
}
"""Of a method that is not named here every list that some method has counts, as that method's entries match."""


def exception(method: str, section: Section, module: str) -> str | None:
    """The key by which the module is left alone, None where it is quantized.

    Gate and up stacked are left alone where both are.
    """
    key = _exception(method, section, module)
    parent, _, role = module.rpartition(".")
    if key is None and role == GATE_UP:
        keys = [_exception(method, section, f"{parent}.{half}") for half in (GATE, UP)]
        return keys[0] if None not in keys else None
    return key


def _exception(method: str, section: Section, module: str) -> str | None:
    for key, match in LISTS.get(method, _EVERY):
        if mentions(match, section.names(key), module, section):
            return key
    rule = _RULES.get(method)
    return rule(section, module) if rule else None


def _gptq(section: Section, module: str) -> str | None:
    """GPTQModel's `dynamic` ("-:" and a pattern), and `modules_in_block_to_quantize` (parts of names)."""
    for entry in section.objects("dynamic"):
        if entry.startswith("-:") and mentions(exact, ["re:" + entry[2:]], module, section):
            return "dynamic"
    key = "modules_in_block_to_quantize"
    groups = section.values.get(key)
    if groups is None:
        return None
    if isinstance(groups, list) and all(isinstance(group, list) for group in groups):
        groups = [name for group in groups for name in group]
    quantized = Section(section.file, section.path, {key: groups}).names(key)
    return None if any(name in module for name in quantized) else key


def _auto_round(section: Section, module: str) -> str | None:
    """`extra_config` (names or patterns, 16 bits and more are none), and the blocks that are quantized at all."""
    for entry, settings in section.objects("extra_config").items():
        named = entry in names_of(module) or mentions(exact, ["re:" + _whole(entry)], module, section)
        if named and isinstance(settings, dict) and _bits(settings) >= _PLAIN_BITS:
            return "extra_config"
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        blocks = section.values.get(key)
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        if isinstance(blocks, list) and not any(name.startswith(str(b)) for b in blocks for name in names_of(module)):
            return key
    return None


_PLAIN_BITS = 16


def _whole(entry: str) -> str:
    return f"(?:{entry})$"


def _bits(settings: Mapping[str, Any]) -> int:
    bits = settings.get("bits")
    return bits if isinstance(bits, int) else 0


def _aqlm(section: Section, module: str) -> str | None:
    key = "linear_weights_not_to_quantize"
    return key if mentions(exact, section.names(key), f"{module}.weight", section) else None


def _quark(section: Section, module: str) -> str | None:
    """`layer_quant_config`: the first pattern that fits goes before the global one; without a weight it is none."""
    key = "layer_quant_config"
    for entry, settings in section.objects(key).items():
        if mentions(wildcard, [entry], module, section):
            plain = settings is None or (isinstance(settings, dict) and settings.get("weight") is None)
            return key if plain else None
    return None


def _torchao(section: Section, module: str) -> str | None:
    """FqnToConfig, once ModuleFqnToConfig: names, or patterns of whole names, and null for what is left alone."""
    default = section.objects("quant_type").get("default")
    data = default.get("_data") if isinstance(default, dict) else None
    for key in ("fqn_to_config", "module_fqn_to_config"):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, dict):
            continue
        named = [entry for entry in entries if mentions(exact, [_whole_pattern(entry)], module, section)]
        for entry in (*sorted(named, key=lambda entry: entry.startswith("re:")), "_default"):
            if entry in entries:
                return f"quant_type.default._data.{key}" if entries[entry] is None else None
        return f"quant_type.default._data.{key}"
    return None


def _mlx(section: Section, module: str) -> str | None:
    """A module's own key, false for what is left alone."""
    return next((name for name in names_of(module) if section.values.get(name) is False), None)


def _whole_pattern(entry: str) -> str:
    return "re:" + _whole(entry[3:]) if entry.startswith("re:") else entry


_RULES: Mapping[str, Callable[[Section, str], str | None]] = {
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "aqlm": _aqlm,
    "quark": _quark,
    "torchao": _torchao,
    "MLX": _mlx,
}
