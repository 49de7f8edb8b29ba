"""`quant_method: compressed-tensors`, as llm-compressor writes it: groups of targets and their arguments."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.quantization.names import mentions, names_of, pattern_only
from reshard.quantization.section import Section
from reshard.schemes.match import QuantSpec
from reshard.schemes.table import FLOAT, kind_said

_Args = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "type": (str,),
    "num_bits": (int,),
    "strategy": (str,),
    "group_size": (int,),
    "symmetric": (bool,),
    "dynamic": (bool, str),
}
"""Of the arguments that are read."""

_INPUTS: Mapping[tuple[str, Any], str] = {
    ("block", True): "group",
    ("channel", True): "token",
    ("channel", False): "tensor",
    ("tensor", True): "tensor",
    ("tensor", False): "tensor",
}
"""By the weights' strategy and whether activations are dynamic, the strategy of activations that is split."""

_NAMES: Mapping[tuple[str, Any, str | None], str] = {
    ("float4", 16, "float4"): "NVFP4",
    ("float4", 16, None): "NVFP4A16",
    ("float4", 32, "float4"): "MXFP4",
    ("float4", 32, None): "MXFP4A16",
    ("float8", 32, "float8"): "MXFP8",
    ("int4", 32, None): "W4A16",
    ("int4", 64, None): "W4A16",
    ("int4", 128, None): "W4A16",
    ("int8", None, None): "W8A16",
    ("float8", None, None): "FP8 weights alone",
}
"""What formats are called that are not split, by the weights' number and group, and the activations' number."""


def declared_by_groups(section: Section, module: str) -> QuantSpec:
    """The group that targets the module; nothing is quantized that no group targets.

    An exact name goes before a pattern, and a pattern before a class, as compressed-tensors and vLLM have it. Raises
    SourceError where two groups of one rank have other arguments: those two take the first by the alphabet, and the
    first in the file.
    """
    groups = section.values.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise section.error("config_groups", "is not an object of groups")
    targets = {name: _targets(section, name, group) for name, group in groups.items()}
    own = names_of(module)
    ranks: tuple[Callable[[list[str]], bool], ...] = (
        lambda entries: any(entry in own for entry in section.timed(entries)),
        lambda entries: mentions(pattern_only, entries, module, section),
        lambda entries: "Linear" in entries,
    )
    for targeted in ranks:
        made = {name: _made(section, name, groups[name]) for name in groups if targeted(targets[name])}
        if len(set(made.values())) > 1:
            raise SourceError(
                f"{module}: {section.file} puts it into the groups {' and '.join(made)}, which differ: "
                f"{'; '.join(f'{name} is {kind}' for name, (kind, _) in made.items())}"
            )
        for name, (kind, block) in made.items():
            return QuantSpec(kind, block, section.says(f"compressed-tensors {name}"))
    return QuantSpec(FLOAT, None, section.says(f"no group of {section.path.rpartition('.')[2]} targets it"))


def _targets(section: Section, name: str, group: _Args) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise section.error(f"config_groups.{name}", "has no list of targets")
    return targets


def _made(section: Section, name: str, arguments: _Args) -> tuple[str, tuple[int, int] | None]:
    """(kind, scale block) of a group's arguments; a kind that is not split is spelt out, to be refused by that name."""
    group = section.below(f"config_groups.{name}", arguments)
    weights, inputs, outputs = (
        _arguments(group, key) for key in ("weights", "input_activations", "output_activations")
    )
    strategy, dynamic = str(weights.get("strategy")), inputs.get("dynamic")
    plain = weights.get("symmetric") and not weights.get("dynamic") and not outputs
    alike = _number(inputs) == _number(weights)
    if plain and alike and isinstance(dynamic, bool) and _INPUTS.get((strategy, dynamic)) == inputs.get("strategy"):
        block = None
        if strategy == "block":
            block = group.below("weights", weights).block("block_structure")
        zero_points = "" if _symmetric(inputs) else " asymmetric"
        how = "dynamic" if dynamic else "static"
        kind = kind_said(f"compressed-tensors {_number(weights)} {strategy} {how}{zero_points}")
        # vLLM takes the weights' block for the group, whatever the group is.
        if kind is not None and (block is None or inputs.get("group_size") in (None, block[1])):
            return kind, block
    return _spelt(weights, inputs, outputs), None


def _arguments(group: Section, key: str) -> _Args:
    """Raises SourceError where one that is read is of a type that tools do not write."""
    found = group.objects(key)
    for name, types in _TYPES.items():
        value = found.get(name)
        if value is not None and type(value) not in types:
            expected = " or ".join(one.__name__ for one in types)
            raise group.error(f"{key}.{name}", f"is {reprlib.repr(value)}, expected a value of type {expected}")
    return found


def _number(arguments: _Args) -> str:
    return f"{arguments.get('type')}{arguments.get('num_bits')}"


def _symmetric(arguments: _Args) -> bool:
    return arguments.get("symmetric", True) is True


def _spelt(weights: _Args, inputs: _Args, outputs: _Args) -> str:
    number = _number(inputs) if inputs else None
    text = f"weights {_number(weights)} {weights.get('strategy')} {'' if weights.get('symmetric') else 'a'}symmetric, "
    if inputs:
        group = f" of {inputs['group_size']}" if inputs.get("group_size") is not None else ""
        zero_points = "" if _symmetric(inputs) else " asymmetric"
        text += f"activations {number} {inputs.get('strategy')}{group}{zero_points} dynamic={inputs.get('dynamic')}"
    else:
        text += "activations as they are"
    if outputs:
        text += f", outputs {_number(outputs)}"
    name = _NAMES.get((_number(weights), weights.get("group_size"), number))
    return f"{name} ({text})" if name else text
