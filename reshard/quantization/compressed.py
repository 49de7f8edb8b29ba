"""`quant_method: compressed-tensors`, as llm-compressor writes it: groups of targets and their arguments."""

from collections.abc import Callable, Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.quantization.names import mentions, names_of
from reshard.quantization.section import Section
from reshard.schemes import FLOAT, QuantSpec

METHOD = "compressed-tensors"

_CLASSES = frozenset({"Linear"})
_Args = Mapping[str, Any]
_Made = tuple[str, tuple[int, int] | None]
"""(kind, scale block)"""


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
    for rank in (_by_name, _by_pattern, _by_class):
        matching = [name for name in groups if rank(section, targets[name], module)]
        if not matching:
            continue
        made = {name: _made(section, name, groups[name]) for name in matching}
        if len(set(made.values())) > 1:
            raise SourceError(
                f"{module}: {section.file} puts it into the groups {' and '.join(matching)}, which differ: "
                f"{'; '.join(f'{name} is {kind}' for name, (kind, _) in made.items())}"
            )
        kind, block = made[matching[0]]
        return QuantSpec(kind, block, section.says(f"{METHOD} {matching[0]}"))
    return QuantSpec(FLOAT, None, section.says(f"no group of {section.path.rpartition('.')[2]} targets it"))


def _targets(section: Section, name: str, group: _Args) -> list[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise section.error(f"config_groups.{name}", "has no list of targets")
    return targets


def _by_name(section: Section, targets: list[str], module: str) -> bool:
    return any(name in targets for name in names_of(module))


def _by_pattern(section: Section, targets: list[str], module: str) -> bool:
    return mentions(lambda entry, name: False, targets, module, section)


def _by_class(section: Section, targets: list[str], module: str) -> bool:
    return not _CLASSES.isdisjoint(targets)


def _made(section: Section, name: str, group: _Args) -> _Made:
    """The kind that a group's arguments make; one that no variant has is spelt out, to be refused by that name."""
    arguments = {key: group.get(key) or {} for key in ("weights", "input_activations", "output_activations")}
    for key, value in arguments.items():
        if not isinstance(value, dict):
            raise section.error(f"config_groups.{name}.{key}", "is not an object")
    weights, inputs, outputs = arguments.values()
    # Compared, not looked up: any JSON value may stand there, a list too.
    said = [_number(weights), weights.get("strategy"), inputs.get("dynamic")]
    rule = next((rule for key, rule in _KINDS.items() if list(key) == said), None)
    alike = weights.get("symmetric") and not weights.get("dynamic") and _number(inputs) == _number(weights)
    made = rule(section, name, weights, inputs) if rule is not None and alike and not outputs else None
    return made or (_spelt(weights, inputs, outputs), None)


def _number(arguments: _Args) -> str:
    return f"{arguments.get('type')}{arguments.get('num_bits')}"


def _block(section: Section, name: str, weights: _Args, inputs: _Args) -> _Made | None:
    where = Section(section.file, section.at(f"config_groups.{name}.weights"), weights)
    sizes = where.block("block_structure")
    group = inputs.get("group_size")
    # vLLM takes the weights' block for the group, whatever the group is.
    alike = inputs.get("strategy") == "group" and group in (None, sizes[1]) and _symmetric(inputs)
    return ("fp8-block-compressed", sizes) if alike else None


def _fp8_channel(section: Section, name: str, weights: _Args, inputs: _Args) -> _Made | None:
    return ("fp8-channel", None) if _by_token(inputs) else None


def _int8_dynamic(section: Section, name: str, weights: _Args, inputs: _Args) -> _Made | None:
    return ("int8-channel-dynamic", None) if _by_token(inputs) else None


def _by_token(inputs: _Args) -> bool:
    """One symmetric scale for each token: with zero points another sum is computed."""
    return inputs.get("strategy") == "token" and _symmetric(inputs)


def _symmetric(arguments: _Args) -> bool:
    return arguments.get("symmetric", True) is True


def _int8_static(section: Section, name: str, weights: _Args, inputs: _Args) -> _Made | None:
    if inputs.get("strategy") != "tensor":
        return None
    return "int8-channel-static" if inputs.get("symmetric") else "int8-channel-static-asymmetric", None


_KINDS: Mapping[tuple[str, Any, Any], Callable[[Section, str, _Args, _Args], _Made | None]] = {
    ("float8", "block", True): _block,
    ("float8", "channel", True): _fp8_channel,
    ("int8", "channel", True): _int8_dynamic,
    ("int8", "channel", False): _int8_static,
}
"""By weights' number and strategy, and whether the activations' scales are dynamic."""

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
"""What formats are called, by the weights' number and group, and the activations' number."""


def _strategy(arguments: _Args) -> str:
    size = arguments.get("group_size")
    return f"{arguments.get('strategy')}{'' if size is None else f' of {size}'}"


def _spelt(weights: _Args, inputs: _Args, outputs: _Args) -> str:
    number = _number(inputs) if inputs else None
    symmetric = "symmetric" if weights.get("symmetric") else "asymmetric"
    text = f"weights {_number(weights)} {weights.get('strategy')} {symmetric}, " + (
        f"activations {number} {_strategy(inputs)}{'' if _symmetric(inputs) else ' asymmetric'} "
        f"dynamic={inputs.get('dynamic')}"
        if inputs
        else "activations as they are"
    )
    if outputs:
        text += f", outputs {_number(outputs)}"
    name = _NAMES.get((_number(weights), weights.get("group_size"), number))
    return f"{name} ({text})" if name else text
