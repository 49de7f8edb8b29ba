"""What a model's parameters are in a checkpoint of a variant: the tensors of a linear, and how the files say so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from reshard.errors import SchemeError
from reshard.schemes.declare import description_type, quantization_config
from reshard.schemes.table import BLOCK, VARIANTS, Operand, Variant
from reshard.synth.model import Kind, Parameter
from reshard.tensors.dtypes import TORCH, itemsize, nbytes


class Fill(Enum):
    """What a tensor's values are beside those of a linear; reshard.synth.values makes them."""

    WEIGHT = "about normal"
    NORM = "around 1"
    FREQUENCIES = "positive, around 1e-3"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the checkpoint; `weight` is the shape of the weight that it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Fill | Operand
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
    """A variant, and the type of what is not quantized."""

    variant: Variant
    floating: str = "BF16"

    @property
    def quantized(self) -> frozenset[Kind]:
        """Parameters that get these tensors."""
        return frozenset({Kind.LINEAR} if description_type(self.variant) else {Kind.LINEAR, Kind.ABSORBED})


def _floats(name: str, dtype: str) -> Recipe:
    (weight,) = VARIANTS[0].tensors
    return Recipe(replace(VARIANTS[0], name=name, tensors=(replace(weight, dtypes=(dtype,)),)), dtype)


RECIPES = {variant.name: Recipe(variant) for variant in VARIANTS} | {
    "fp16": _floats("fp16", "F16"),
    "fp32": _floats("fp32", "F32"),
}


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
        fill = {Kind.NORM: Fill.NORM, Kind.FREQUENCIES: Fill.FREQUENCIES}.get(parameter.kind, Fill.WEIGHT)
        yield TensorSpec(parameter.name, dtype, parameter.shape, fill, parameter.shape)
        return
    module = parameter.name.removesuffix(".weight")
    block = recipe.variant.block or BLOCK
    for rule in recipe.variant.tensors:
        shape = rule.shape.sizes(parameter.shape, block)[0]
        yield TensorSpec(f"{module}.{rule.suffix}", rule.dtypes[0], shape, rule.operand, parameter.shape)


def declare_in_config(config: dict[str, Any], recipe: Recipe, parameters: Sequence[Parameter]) -> None:
    """Make config.json say how the checkpoint is quantized, or nothing of it where ModelSlim's description does."""
    config["dtype" if "dtype" in config else "torch_dtype"] = TORCH[recipe.floating]
    config.pop("quantization_config", None)
    heads = [parameter.name.removesuffix(".weight") for parameter in parameters if parameter.kind is Kind.HEAD]
    section = quantization_config(recipe.variant, ["Linear"], heads)
    if section is not None:
        config["quantization_config"] = section


def description(recipe: Recipe, parameters: Sequence[Parameter]) -> dict[str, Any] | None:
    """ModelSlim's account of each tensor's type, None for other tools."""
    kind = description_type(recipe.variant)
    if kind is None:
        return None
    types: dict[str, Any] = {
        tensor.name: kind if parameter.kind in recipe.quantized else "FLOAT"
        for parameter in parameters
        for tensor in tensors_of(parameter, recipe)
    }
    group = recipe.variant.block[1] if recipe.variant.block else 0
    return types | {"version": "1.0.0", "model_quant_type": kind, "metadata": {}, "group_size": group, "optional": {}}
