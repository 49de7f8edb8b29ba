"""Modules that a quantization_config leaves alone: whatever the rest is, they hold plain weights, and those are cut."""

from collections.abc import Callable

from reshard.model.parts import DENSE_FFN
from reshard.quantization.names import Match, at_boundary, component, exact, mentions, names_of, wildcard
from reshard.quantization.section import Section

Lists = tuple[tuple[str, Match], ...]
"""Keys that list modules, and how their entries match."""
Rule = Callable[[Section, str], str | None]
"""(section, module) -> the key by which the module is left alone, None where it is quantized"""

EVERY_LIST: Lists = (
    ("modules_to_not_convert", at_boundary),
    ("ignored_layers", at_boundary),
    ("ignore", wildcard),
    ("exclude_modules", wildcard),
    ("exclude", wildcard),
    ("llm_int8_skip_modules", component),
    ("skip_modules", component),
)
"""Of a method whose lists are not known: those that some method has, matched as that method does."""


def left_alone(lists: Lists, rule: Rule | None, section: Section, module: str) -> str | None:
    """The key by which the module is left alone, None where it is quantized.

    Gate and up stacked are left alone where both are.
    """
    listed = (key for key, match in lists if mentions(match, section.names(key), module, section))
    key = next(listed, None) or (rule(section, module) if rule else None)
    parent, _, role = module.rpartition(".")
    if key is None and (halves := DENSE_FFN.stacked(role)):
        keys = [left_alone(lists, rule, section, f"{parent}.{half}") for half in halves]
        return keys[0] if None not in keys else None
    return key


def gptq(section: Section, module: str) -> str | None:
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
    quantized = section.below("", {key: groups}).names(key)
    return None if any(name in module for name in quantized) else key


def auto_round(section: Section, module: str) -> str | None:
    """`extra_config` (names or patterns, 16 bits and more are none), and the blocks that are quantized at all."""
    for entry, settings in section.objects("extra_config").items():
        named = entry in names_of(module) or mentions(exact, [_whole(entry)], module, section)
        bits = settings.get("bits") if named and isinstance(settings, dict) else None
        if isinstance(bits, int) and bits >= 16:
            return "extra_config"
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        blocks = section.values.get(key)
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks
        if isinstance(blocks, list) and not any(name.startswith(str(b)) for b in blocks for name in names_of(module)):
            return key
    return None


def _whole(pattern: str) -> str:
    return f"re:(?:{pattern})$"


def aqlm(section: Section, module: str) -> str | None:
    key = "linear_weights_not_to_quantize"
    return key if mentions(exact, section.names(key), f"{module}.weight", section) else None


def quark(section: Section, module: str) -> str | None:
    """`layer_quant_config`: the first pattern that fits goes before the global one; without a weight it is none."""
    key = "layer_quant_config"
    for entry, settings in section.objects(key).items():
        if mentions(wildcard, [entry], module, section):
            plain = settings is None or (isinstance(settings, dict) and settings.get("weight") is None)
            return key if plain else None
    return None


def torchao(section: Section, module: str) -> str | None:
    """FqnToConfig, once ModuleFqnToConfig: names, then patterns of whole names; null for what is left alone."""
    default = section.objects("quant_type").get("default")
    data = default.get("_data") if isinstance(default, dict) else None
    for key in ("fqn_to_config", "module_fqn_to_config"):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, dict):
            continue
        patterns = {entry: _whole(entry[3:]) if entry.startswith("re:") else entry for entry in entries}
        named = [entry for entry, pattern in patterns.items() if mentions(exact, [pattern], module, section)]
        order = (*sorted(named, key=lambda entry: entry.startswith("re:")), "_default")
        chosen = next((entry for entry in order if entry in entries), None)
        return f"quant_type.default._data.{key}" if chosen is None or entries[chosen] is None else None
    return None


def mlx(section: Section, module: str) -> str | None:
    """A module's own key, false for what is left alone."""
    return next((name for name in names_of(module) if section.values.get(name) is False), None)
