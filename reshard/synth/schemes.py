"""What each tool makes of a model's parameters: the tensors of a linear, and how the files say so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from reshard.errors import SchemeError
from reshard.schemes import Shape
from reshard.synth.model import Kind, Parameter
from reshard.tensors.dtypes import itemsize, nbytes

_BLOCK = 128


class Fill(Enum):
    """What a tensor's values are; reshard.synth.values makes them."""

    WEIGHT = "weights: about normal, or every int8"
    NORM = "around 1"
    SCALE = "positive, around 1e-3"
    ZERO = "zeros"
    INPUT_SCALE = "positive, the same for gate and up"
    INPUT_OFFSET = "a whole number, the same for gate and up"
    QUANT_BIAS = "round(-sum over in_features of weight * input_offset)"
    DEQ_SCALE = "input_scale * weight_scale in float32"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the checkpoint; `weight` is the shape of the weight that it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Fill
    weight: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return nbytes(self.dtype, self.shape)

    @property
    def order(self) -> tuple[int, str]:
        """Place in a file, as safetensors' own writer has it: wide types first, so that each is aligned."""
        return -itemsize(self.dtype), self.name


@dataclass(frozen=True)
class Recipe:
    """How a tool writes a linear (suffix, dtype, shape, values) and declares it."""

    tensors: tuple[tuple[str, str, Shape, Fill], ...]
    floating: str = "BF16"  # what is not quantized
    description: str | None = None  # ModelSlim's type string
    quantization: dict[str, Any] | None = None  # config.json's quantization_config

    @property
    def quantized(self) -> frozenset[Kind]:
        """Parameters that get these tensors."""
        return frozenset({Kind.LINEAR} if self.description else {Kind.LINEAR, Kind.ABSORBED})


def _weight(dtype: str) -> tuple[str, str, Shape, Fill]:
    return "weight", dtype, Shape.OUT_IN, Fill.WEIGHT


def _compressed(number: str, inputs: str) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it for a scale per channel and activations per token."""
    unset: dict[str, Any] = {"actorder": None, "block_structure": None, "group_size": None, "observer_kwargs": {}}
    both = {"num_bits": 8, "type": number, "symmetric": True, **unset}
    return {
        "config_groups": {
            "group_0": {
                "format": f"{number}-quantized",
                "input_activations": {**both, "dynamic": True, "observer": None, "strategy": inputs},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**both, "dynamic": False, "observer": "memoryless_minmax", "strategy": "channel"},
            }
        },
        "format": f"{number}-quantized",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _blocks(method: str, **extra: str) -> dict[str, Any]:
    return {"activation_scheme": "dynamic", **extra, "quant_method": method, "weight_block_size": [_BLOCK, _BLOCK]}


_CHANNEL = (
    ("weight_scale", "F32", Shape.CHANNEL, Fill.SCALE),
    ("weight_offset", "F32", Shape.CHANNEL, Fill.ZERO),
)
_STATIC = (
    ("quant_bias", "I32", Shape.OUT, Fill.QUANT_BIAS),
    ("input_scale", "F32", Shape.ONE, Fill.INPUT_SCALE),
    ("input_offset", "F32", Shape.ONE, Fill.INPUT_OFFSET),
    ("deq_scale", "F32", Shape.OUT, Fill.DEQ_SCALE),
)
_SCALE_BF16 = ("weight_scale", "BF16", Shape.CHANNEL, Fill.SCALE)
_SCALE_INV = ("weight_scale_inv", "F32", Shape.BLOCKS, Fill.SCALE)

RECIPES = {
    "bf16": Recipe((_weight("BF16"),)),
    "fp16": Recipe((_weight("F16"),), floating="F16"),
    "fp32": Recipe((_weight("F32"),), floating="F32"),
    "fp8_block": Recipe((_weight("F8_E4M3"), _SCALE_INV), quantization=_blocks("fp8", fmt="e4m3")),
    "fp8_channel": Recipe((_weight("F8_E4M3"), _SCALE_BF16), quantization=_compressed("float", "token")),
    "int8_block": Recipe((_weight("I8"), _SCALE_INV), quantization=_blocks("blockwise_int8")),
    "w8a8_compressed": Recipe((_weight("I8"), _SCALE_BF16), quantization=_compressed("int", "token")),
    "w8a8_dynamic": Recipe((_weight("I8"), *_CHANNEL), description="W8A8_DYNAMIC"),
    "w8a8_mix": Recipe((_weight("I8"), *_STATIC, *_CHANNEL), description="W8A8_MIX"),
    "w8a8_static": Recipe((_weight("I8"), *_STATIC), description="W8A8"),
}

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def recipe_for(scheme: str) -> Recipe:
    """The recipe of that name. Raises SchemeError with the names there are."""
    recipe = RECIPES.get(scheme)
    if recipe is None:
        raise SchemeError(f"scheme {scheme!r} is not one that can be made; there are {', '.join(RECIPES)}")
    return recipe


def tensors_of(parameter: Parameter, recipe: Recipe) -> Iterator[TensorSpec]:
    """The tensors that stand for a parameter."""
    if parameter.kind not in recipe.quantized:
        dtype = "F32" if parameter.kind is Kind.ROUTER_BIAS else recipe.floating
        fill = {Kind.NORM: Fill.NORM, Kind.FREQUENCIES: Fill.SCALE}.get(parameter.kind, Fill.WEIGHT)
        yield TensorSpec(parameter.name, dtype, parameter.shape, fill, parameter.shape)
        return
    module = parameter.name.removesuffix(".weight")
    out_features, in_features = parameter.shape
    shapes: dict[Shape, tuple[int, ...]] = {
        Shape.OUT_IN: parameter.shape,
        Shape.CHANNEL: (out_features, 1),
        Shape.OUT: (out_features,),
        Shape.ONE: (1,),
        Shape.BLOCKS: (-(-out_features // _BLOCK), -(-in_features // _BLOCK)),
    }
    for suffix, dtype, shape, fill in recipe.tensors:
        yield TensorSpec(f"{module}.{suffix}", dtype, shapes[shape], fill, parameter.shape)


def declare_in_config(config: dict[str, Any], recipe: Recipe, parameters: Sequence[Parameter]) -> None:
    """Make config.json say how the checkpoint is quantized, or nothing of it where ModelSlim's description does."""
    config["dtype" if "dtype" in config else "torch_dtype"] = _TORCH_DTYPES[recipe.floating]
    config.pop("quantization_config", None)
    if recipe.quantization is not None:
        quantization = dict(recipe.quantization)
        if "ignore" in quantization:
            quantization["ignore"] = [p.name.removesuffix(".weight") for p in parameters if p.kind is Kind.HEAD]
        config["quantization_config"] = quantization


def description(recipe: Recipe, parameters: Sequence[Parameter]) -> dict[str, Any] | None:
    """ModelSlim's account of each tensor's type, None for other tools."""
    if recipe.description is None:
        return None
    types: dict[str, Any] = {
        tensor.name: recipe.description if parameter.kind in recipe.quantized else "FLOAT"
        for parameter in parameters
        for tensor in tensors_of(parameter, recipe)
    }
    return types | {
        "version": "1.0.0",
        "model_quant_type": recipe.description,
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
