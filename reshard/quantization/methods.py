"""What a quantization_config says of a module: by its quant_method, the modules left alone and what the others are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.quantization.compressed import declared_by_groups
from reshard.quantization.exceptions import (
    EVERY_LIST,
    Lists,
    Rule,
    aqlm,
    auto_round,
    gptq,
    left_alone,
    mlx,
    quark,
    torchao,
)
from reshard.quantization.formats import needs_block
from reshard.quantization.names import at_boundary, component, contained, exact, names_of, wildcard
from reshard.quantization.section import Section
from reshard.schemes.match import QuantSpec
from reshard.schemes.table import FLOAT, kind_said

NO_BLOCK_SIZE = frozenset(kind_said(f"fp8 tensor {activations}") for activations in ("dynamic", "static"))
"""The kinds that vLLM reads where weight_block_size is missing."""

FP8_PB_WO = "FP8_PB_WO (FP8 in blocks of 128 x 128)"
"""Weights alone by its name; vLLM quantizes the activations, too (its modelopt.py), as fp8_block does."""


@dataclass(frozen=True)
class Method:
    """lists: the keys that list modules which are left alone, and how their entries match. rule: what else leaves one
    alone. declare: what the others are, where neither the method's name says it (kind_said) nor that it is not split.
    block: its scale block where weight_block_size is absent.
    """

    lists: Lists = EVERY_LIST
    rule: Rule | None = None
    declare: Callable[[Section, str], QuantSpec | None] | None = None
    block: tuple[int, int] | None = None


def declared_by_section(section: Section, module: str) -> QuantSpec | None:
    """FLOAT for a module that the method leaves alone; of a method that is not split, the method's own name.

    None: it says nothing of the module. Raises SourceError for values that make no sense.
    """
    name = _method_of(section)
    method = METHODS.get(name, Method())
    key = left_alone(method.lists, method.rule, section, module)
    if key is not None:
        return QuantSpec(FLOAT, None, f"{section.file} ({section.at(key)})")
    if method.declare is not None:
        return method.declare(section, module)
    named = isinstance(section.values.get("quant_method"), str)
    said_by = section.says(f"quant_method {name}" if named else section.path)
    kind, block = kind_said(name), None
    if kind is not None and needs_block(kind):
        given = section.values.get("weight_block_size")
        block = method.block if method.block and given is None else section.block("weight_block_size")
    return QuantSpec(kind or name, block, said_by)


def key_of_left_alone(method: str) -> str:
    """The key under which a method that is known lists the modules that it leaves alone."""
    return METHODS[method].lists[0][0]


def _method_of(section: Section) -> str:
    """The method's name; told by what it has where it is not named, as vLLM tells it."""
    method = section.values.get("quant_method")
    if method is None:
        if "quant_algo" in section.values:
            return "modelopt"
        if "config_groups" in section.values:
            return "compressed-tensors"
        if {"bits", "group_size"} <= section.values.keys():  # mlx-lm writes no more
            return "MLX"
    if isinstance(method, str):
        return "modelopt" if method.startswith("modelopt") else method
    return f"quant_method {method!r}"


def _fp8(section: Section, module: str) -> QuantSpec:
    """As deepseek-ai and transformers write it."""
    form = str(section.values.get("fmt", "e4m3")).lower()
    activations = section.values.get("activation_scheme", "dynamic")
    in_blocks = section.values.get("weight_block_size") is not None
    block = None
    if "e4m3" not in form or "fnuz" in form:
        kind = f"FP8 {form.upper()}"
    elif (said := kind_said(f"fp8 {'block' if in_blocks else 'tensor'} {activations}")) is not None:
        kind, block = said, section.block("weight_block_size") if in_blocks else None
    else:
        kind = f"FP8 with activation_scheme {activations}"
    return QuantSpec(kind, block, section.says("quant_method fp8"))


def _modelopt(section: Section, module: str) -> QuantSpec | None:
    """By `quant_algo`, also of hf_quant_config.json. None: it is mixed, and the module's is not said."""
    algorithm = section.values.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = section.objects("quantized_layers")
        if not layers:
            return None
        entry: Any = next((layers[name] for name in names_of(module) if name in layers), None)
        if entry is None:
            return QuantSpec(FLOAT, None, section.says("not in quantized_layers"))
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else entry
    if algorithm is None:
        return QuantSpec(FLOAT, None, section.says("quant_algo null"))
    name = str(algorithm).upper()
    kind = kind_said(f"modelopt {name}") or (FP8_PB_WO if name == "FP8_PB_WO" else name)
    return QuantSpec(kind, None, section.says(f"quant_algo {algorithm}"))


def _experts_alone(section: Section, module: str) -> QuantSpec:
    """gpt-oss': neither transformers nor vLLM (its mxfp4.py) quantizes a linear."""
    return QuantSpec(FLOAT, None, section.says(f"quant_method {_method_of(section)}, of experts alone"))


_TRANSFORMERS: Lists = (("modules_to_not_convert", at_boundary), ("ignored_layers", at_boundary))
METHODS: Mapping[str, Method] = {
    "fp8": Method(_TRANSFORMERS, declare=_fp8),
    "compressed-tensors": Method((("ignore", exact),), declare=declared_by_groups),
    "modelopt": Method((("ignore", wildcard), ("exclude_modules", wildcard)), declare=_modelopt),
    "mxfp4": Method(declare=_experts_alone),
    "gpt_oss_mxfp4": Method(declare=_experts_alone),
    "blockwise_int8": Method(_TRANSFORMERS),  # R1 Block-INT8, served by SGLang
    "w8a8_int8": Method((("ignore", exact),)),  # SGLang's w8a8_int8.py
    "w4afp8": Method(block=(128, 128)),  # SGLang's w4afp8.py: experts of 4 bits, linears of FP8
    "quark": Method((("exclude", wildcard),), quark),
    "awq": Method((("modules_to_not_convert", contained),)),
    "bitsandbytes": Method((("llm_int8_skip_modules", component), ("modules_to_not_convert", component))),
    "hqq": Method((("skip_modules", component), ("modules_to_not_convert", at_boundary))),
    "gptq": Method(rule=gptq),
    "auto-round": Method(rule=auto_round),
    "intel/auto-round": Method(rule=auto_round),
    "aqlm": Method(rule=aqlm),
    "torchao": Method(rule=torchao),
    "MLX": Method(rule=mlx),
}
