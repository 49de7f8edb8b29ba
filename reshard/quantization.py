"""What a checkpoint says of each linear's quantisation: ModelSlim's description first, then config.json.

The order is the one that vllm-ascend uses. ModelSlim names every tensor's type; config.json's
`quantization_config` names a method, targets and exceptions.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from reshard.errors import SchemeError, SourceError
from reshard.naming import CONFIG
from reshard.schemes import Declared

Declare = Callable[[str, frozenset[str]], Declared]
"""(module, its suffixes) -> what is said of it."""

_UNQUANTISED = "FLOAT"


def declarations(description: tuple[str, Mapping[str, Any]] | None, config: Mapping[str, Any] | None) -> Declare:
    """A function that tells what is declared for a module.

    description: the name and content of ModelSlim's `quant_model_description*.json`, if there is one.
    """
    if description is not None:
        return _from_description(*description)
    quantization = (config or {}).get("quantization_config")
    if config is None:
        return _without_config
    if quantization is None:
        return lambda module, suffixes: Declared(_UNQUANTISED, None, f"{CONFIG} (no quantization_config)")
    if not isinstance(quantization, dict):
        raise SourceError(f"{CONFIG}: quantization_config is a {type(quantization).__name__}, an object is wanted")
    method = quantization.get("quant_method")
    reader = _METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise SchemeError(
            f"{CONFIG}: quantization_config.quant_method {method!r} is not one this version splits; it knows "
            f"{', '.join(_METHODS)}, and ModelSlim's quant_model_description.json"
        )
    return reader(quantization)


def _from_description(file: str, types: Mapping[str, Any]) -> Declare:
    def declare(module: str, suffixes: frozenset[str]) -> Declared:
        kinds: dict[str, str] = {}
        for suffix in sorted(suffixes):
            kind = types.get(f"{module}.{suffix}")
            if not isinstance(kind, str):
                raise SourceError(f"{module}.{suffix}: {file} does not name it; is the file of this checkpoint?")
            kinds.setdefault(kind, suffix)
        described = {name for name in types if name.startswith(f"{module}.")}
        for name in sorted(described - {f"{module}.{suffix}" for suffix in suffixes}):
            raise SourceError(
                f"{name}: {file} names it ({types[name]}), and no file of the checkpoint holds it; download it again"
            )
        if len(kinds) > 1:
            both = ", ".join(f"{suffix} {kind}" for kind, suffix in kinds.items())
            raise SourceError(
                f"{module}: {file} gives its tensors different types: {both}; is the file of this checkpoint?"
            )
        return Declared(next(iter(kinds)), None, f"{file} ({next(iter(kinds))})")

    return declare


def _without_config(module: str, suffixes: frozenset[str]) -> Declared:
    if suffixes == {"weight"}:
        return Declared(_UNQUANTISED, None, f"no {CONFIG} and a weight alone")
    raise SourceError(
        f"{module}: has {', '.join(sorted(suffixes))}, and neither a {CONFIG} nor a quant_model_description.json says "
        "what they mean; put the model's own beside the files"
    )


def _excepted(module: str, names: Any, key: str) -> bool:
    """Whether a list of exceptions names the module: itself, one of its parents, or `re:` and a pattern."""
    if names is None:
        return False
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{CONFIG}: quantization_config.{key} is not a list of names")
    return any(_names_module(name, module) for name in names)


def _names_module(name: str, module: str) -> bool:
    if name.startswith("re:"):
        try:
            return re.match(name[3:], module) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise SourceError(f"{CONFIG}: quantization_config: {name!r} is not a pattern: {error}") from error
    return module == name or module.startswith(name + ".")


def _block(sizes: Any, key: str) -> tuple[int, int]:
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        raise SourceError(f"{CONFIG}: quantization_config.{key} is {sizes!r}, two block sizes are wanted")
    return sizes[0], sizes[1]


def _fp8(quantization: Mapping[str, Any]) -> Declare:
    """`quant_method: fp8`, as deepseek-ai and transformers write it."""

    def declare(module: str, suffixes: frozenset[str]) -> Declared:
        said_by = f"{CONFIG} (quant_method fp8)"
        for key in ("modules_to_not_convert", "ignored_layers"):
            if _excepted(module, quantization.get(key), key):
                return Declared(_UNQUANTISED, None, f"{CONFIG} (quantization_config.{key})")
        sizes = quantization.get("weight_block_size")
        if sizes is None:
            return Declared("fp8 with one scale per tensor (no weight_block_size)", None, said_by)
        scheme = quantization.get("activation_scheme", "dynamic")
        if scheme != "dynamic":
            return Declared(f"fp8 with activation_scheme {scheme}", None, said_by)
        return Declared("fp8-block", _block(sizes, "weight_block_size"), said_by)

    return declare


def _int8_block(quantization: Mapping[str, Any]) -> Declare:
    """`quant_method: blockwise_int8`, the community's R1 Block-INT8 (served by SGLang)."""
    block = _block(quantization.get("weight_block_size"), "weight_block_size")

    def declare(module: str, suffixes: frozenset[str]) -> Declared:
        if _excepted(module, quantization.get("ignored_layers"), "ignored_layers"):
            return Declared(_UNQUANTISED, None, f"{CONFIG} (quantization_config.ignored_layers)")
        return Declared("int8-block", block, f"{CONFIG} (quant_method blockwise_int8)")

    return declare


def _int8_channel(quantization: Mapping[str, Any]) -> Declare:
    """`quant_method: w8a8_int8`, the name that SGLang has for int8 with one scale per channel."""

    def declare(module: str, suffixes: frozenset[str]) -> Declared:
        if _excepted(module, quantization.get("ignore"), "ignore"):
            return Declared(_UNQUANTISED, None, f"{CONFIG} (quantization_config.ignore)")
        return Declared("int8-channel-dynamic", None, f"{CONFIG} (quant_method w8a8_int8)")

    return declare


def _compressed_tensors(quantization: Mapping[str, Any]) -> Declare:
    """`quant_method: compressed-tensors`, as llm-compressor writes it."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{CONFIG}: quantization_config.config_groups is not an object of groups")

    def declare(module: str, suffixes: frozenset[str]) -> Declared:
        if _excepted(module, quantization.get("ignore"), "ignore"):
            return Declared(_UNQUANTISED, None, f"{CONFIG} (quantization_config.ignore)")
        matching = [name for name, group in groups.items() if _targets(group, module)]
        if not matching:
            return Declared(_UNQUANTISED, None, f"{CONFIG} (no group of quantization_config targets it)")
        if len(matching) > 1:
            raise SourceError(f"{module}: {CONFIG} puts it into the groups {' and '.join(matching)}")
        kind, block = _group_kind(groups[matching[0]])
        return Declared(kind, block, f"{CONFIG} (compressed-tensors {matching[0]})")

    return declare


def _targets(group: Mapping[str, Any], module: str) -> bool:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SourceError(f"{CONFIG}: a group of quantization_config has no list of targets")
    return any(target == "Linear" or _names_module(target, module) for target in targets)


def _group_kind(group: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """The kind that a group's arguments make; one that no variant has is spelt out, to be refused by that name."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    for key, arguments in (("weights", weights), ("input_activations", inputs)):
        if not isinstance(arguments, dict):
            raise SourceError(f"{CONFIG}: a group of quantization_config has {key} that are no object")
    number = f"{weights.get('type')}{weights.get('num_bits')}"
    strategy = weights.get("strategy")
    dynamic = inputs.get("dynamic") if inputs else None
    spelt = (
        f"weights {number} {strategy} {'symmetric' if weights.get('symmetric') else 'asymmetric'}, "
        f"activations {inputs.get('type')}{inputs.get('num_bits')} {inputs.get('strategy')} dynamic={dynamic}"
    )
    same_type = (inputs.get("type"), inputs.get("num_bits")) == (weights.get("type"), weights.get("num_bits"))
    if not weights.get("symmetric") or not same_type:
        return spelt, None
    if (number, strategy, dynamic) == ("float8", "block", True):
        return "fp8-block-compressed", _block(weights.get("block_structure"), "weights.block_structure")
    if (number, strategy, dynamic) == ("float8", "channel", True):
        return "fp8-channel", None
    if (number, strategy, dynamic) == ("int8", "channel", True) and inputs.get("strategy") == "token":
        return "int8-channel-dynamic", None
    if (number, strategy, dynamic) == ("int8", "channel", False) and inputs.get("strategy") == "tensor":
        return "int8-channel-static" if inputs.get("symmetric") else "int8-channel-static-asymmetric", None
    return spelt, None


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Declare]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "blockwise_int8": _int8_block,
    "w8a8_int8": _int8_channel,
}
