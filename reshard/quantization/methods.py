"""What a quantization_config says of a module, by its quant_method."""

from collections.abc import Callable, Mapping

from reshard.quantization.compressed import METHOD, declared_by_groups
from reshard.quantization.exceptions import exception
from reshard.quantization.modelopt import declared_by_modelopt
from reshard.quantization.section import Section
from reshard.schemes import FLOAT, QuantSpec

_MODELOPT, _MLX = "modelopt", "MLX"
_BLOCK_OF_W4AFP8 = (128, 128)

NO_BLOCK_SIZE = "FP8 with one scale per tensor (no weight_block_size)"
"""The kind that vLLM reads where the key is missing."""


def declared_by_method(section: Section, module: str) -> QuantSpec | None:
    """FLOAT for a module that the method leaves alone; of a method that is not split, the method's own name.

    None: it says nothing of the module. Raises SourceError for values that make no sense.
    """
    method = method_of(section)
    key = exception(method, section, module)
    if key is not None:
        return QuantSpec(FLOAT, None, f"{section.file} ({section.at(key)})")
    reader = _READERS.get(method)
    if reader is not None:
        return reader(section, module)
    named = isinstance(section.values.get("quant_method"), str)
    return QuantSpec(method, None, section.says(f"quant_method {method}" if named else section.path))


def method_of(section: Section) -> str:
    """The method's name; told by what it has where it is not named, as vLLM tells it."""
    method = section.values.get("quant_method")
    if method is None:
        if "quant_algo" in section.values:
            return _MODELOPT
        if "config_groups" in section.values:
            return METHOD
        if {"bits", "group_size"} <= section.values.keys():  # mlx-lm writes no more
            return _MLX
    if isinstance(method, str):
        return _MODELOPT if method.startswith(_MODELOPT) else method
    return f"quant_method {method!r}"


def _fp8(section: Section, module: str) -> QuantSpec:
    """As deepseek-ai and transformers write it."""
    said_by = section.says("quant_method fp8")
    form = str(section.values.get("fmt", "e4m3")).lower()
    if "e4m3" not in form or "fnuz" in form:
        return QuantSpec(f"FP8 {form.upper()}", None, said_by)
    if section.values.get("weight_block_size") is None:
        return QuantSpec(NO_BLOCK_SIZE, None, said_by)
    activations = section.values.get("activation_scheme", "dynamic")
    if activations != "dynamic":
        return QuantSpec(f"FP8 with activation_scheme {activations}", None, said_by)
    return QuantSpec("fp8-block", section.block("weight_block_size"), said_by)


def _int8_block(section: Section, module: str) -> QuantSpec:
    """The community's R1 Block-INT8, served by SGLang."""
    return QuantSpec("int8-block", section.block("weight_block_size"), section.says("quant_method blockwise_int8"))


def _int8_channel(section: Section, module: str) -> QuantSpec:
    """SGLang's name for int8 with one scale per channel and per token (its w8a8_int8.py)."""
    return QuantSpec("int8-channel-dynamic", None, section.says("quant_method w8a8_int8"))


def _fp8_channel(section: Section, module: str) -> QuantSpec:
    """The same of FP8 (SGLang's w8a8_fp8.py)."""
    return QuantSpec("fp8-channel", None, section.says("quant_method w8a8_fp8"))


def _w4afp8(section: Section, module: str) -> QuantSpec:
    """SGLang's: experts of 4 bits, and linears that are FP8 in blocks of a fixed size (its w4afp8.py)."""
    block = _BLOCK_OF_W4AFP8 if section.values.get(key := "weight_block_size") is None else section.block(key)
    return QuantSpec("fp8-block", block, section.says("quant_method w4afp8"))


def _experts_alone(section: Section, module: str) -> QuantSpec:
    """gpt-oss': neither transformers nor vLLM (its mxfp4.py) quantizes a linear."""
    return QuantSpec(FLOAT, None, section.says(f"quant_method {method_of(section)}, of experts alone"))


_READERS: Mapping[str, Callable[[Section, str], QuantSpec | None]] = {
    "fp8": _fp8,
    METHOD: declared_by_groups,
    "blockwise_int8": _int8_block,
    "w8a8_int8": _int8_channel,
    "w8a8_fp8": _fp8_channel,
    "w4afp8": _w4afp8,
    "mxfp4": _experts_alone,
    "gpt_oss_mxfp4": _experts_alone,
    _MODELOPT: declared_by_modelopt,
}
"""The methods of which something is split."""
