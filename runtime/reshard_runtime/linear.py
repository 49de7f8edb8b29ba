"""A rank's linears, one class for each way of multiplying, and how tokens travel to them.

Shapes: T tokens, K in_features, N out_features of this rank's part.
"""

import copy
from math import prod
from typing import Any, Literal

import torch

from reshard.errors import ShardError
from reshard.schemes.table import Arithmetic, Operand, scheme_named, variant_with
from reshard.tensors.dtypes import TORCH
from reshard_runtime.kernels import Kernels
from reshard_runtime.shard import LinearShard
from reshard_runtime.tokens import pack, unpack

Mix = Literal["dynamic", "static"]

Tokens = tuple[torch.Tensor, ...]
"""Tokens as a linear multiplies them: (x_TK,), (q_TK,) or (q_TK, scale_T)."""


class Linear(torch.nn.Module):
    """y_TN = x_TK @ weight_NK^T."""

    def __init__(self, shard: LinearShard, kernels: Kernels) -> None:
        super().__init__()
        weight = operands(shard)[Operand.WEIGHT]
        self.kernels = kernels
        self.shape = tuple(weight.shape)
        self.weight = _constant(kernels.weight(f"{shard.name}.weight", weight))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Linear":
        """It shares the weight, which nothing changes, and which torch cannot copy where oneDNN has packed it."""
        memo[id(self.weight)] = self.weight
        copied: Linear = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def quantize(self, x_TK: torch.Tensor) -> Tokens:
        """The tokens as this linear multiplies them."""
        raise NotImplementedError

    def pack(self, tokens: Tokens) -> torch.Tensor:
        """[T, W], what travels."""
        return tokens[0]

    def unpack(self, rows_TW: torch.Tensor) -> Tokens:
        """What `pack` packed."""
        return (rows_TW,)

    def multiply(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        """[T, N] in `dtype`."""
        raise NotImplementedError

    def keep_not_finite(self, y_TM: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """What was made of tokens x_TK that were quantized here: NaN, maybe in place, where they were not finite."""
        return y_TM


class FloatLinear(Linear):
    """Not quantized; accumulated in float32, rounded to the weight's type."""

    def quantize(self, x_TK: torch.Tensor) -> Tokens:
        return (x_TK,)

    def multiply(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        return self.kernels.linear(tokens[0], self.weight).to(dtype)


class DynamicLinear(Linear):
    """int8 weights with a scale for each channel, int8 tokens with a scale for each token.

    y = (q @ weight^T) * weight_scale * token_scale.
    """

    def __init__(self, shard: LinearShard, kernels: Kernels) -> None:
        super().__init__(shard, kernels)
        self.weight_scale = _constant(operands(shard)[Operand.SCALE].reshape(-1).float())

    def quantize(self, x_TK: torch.Tensor) -> Tokens:
        return self.kernels.quantize_dynamic(x_TK)

    def pack(self, tokens: Tokens) -> torch.Tensor:
        return pack(*tokens)

    def unpack(self, rows_TW: torch.Tensor) -> Tokens:
        return unpack(rows_TW)

    def multiply(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        q_TK, scale_T = tokens
        return self.kernels.int8_linear(q_TK, self.weight, self.weight_scale, scale_T, None, dtype)


class StaticLinear(Linear):
    """int8 weights, int8 tokens with one scale and offset for all, fixed by calibration.

    q = clamp(round(x / input_scale + input_offset)); y = (q @ weight^T + quant_bias) * deq_scale, where
    quant_bias = -round(sum over in_features of weight * input_offset), deq_scale = input_scale * weight_scale.
    ModelSlim stores both; its quant_bias is over all in_features, and the shard of rank 0 alone holds down's. From
    compressed-tensors' input_zero_point it is made here, over this rank's columns, which adds up to the same.
    """

    def __init__(self, shard: LinearShard, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__(shard, kernels)
        of = operands(shard)
        input_scale = of[Operand.INPUT_SCALE].float()
        offset = of.get(Operand.INPUT_OFFSET, torch.zeros_like(input_scale)).float()
        if not input_scale.is_meta and not bool((input_scale > 0).all()):
            raise ShardError(f"{shard.name}.input_scale is {input_scale.tolist()}; a scale must be above 0")
        if Operand.OUTPUT_SCALE in of:
            deq_scale = _deq_scale(of[Operand.OUTPUT_SCALE])
            bias: torch.Tensor | None = of[Operand.BIAS].clone()
        else:
            deq_scale = input_scale * of[Operand.SCALE].reshape(-1).float()
            bias = None
            if _has_values(offset):
                bias = -of[Operand.WEIGHT].sum(dim=1, dtype=torch.int32) * offset.to(torch.int32)
        self.reciprocal = _constant(1.0 / input_scale)
        self.offset = _constant(offset)
        self.scale = _constant(kernels.output_scale(deq_scale, dtype))
        self.bias = None if bias is None else _constant(bias)

    def quantize(self, x_TK: torch.Tensor) -> Tokens:
        return (self.kernels.quantize_static(x_TK, self.reciprocal, self.offset),)

    def multiply(self, tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
        return self.kernels.int8_linear(tokens[0], self.weight, self.scale, None, self.bias, dtype)

    def keep_not_finite(self, y_TM: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        return self.kernels.keep_not_finite(y_TM, x_TK)


def make_linear(shard: LinearShard, kernels: Kernels, mix: Mix, dtype: torch.dtype) -> Linear:
    """The linear of a shard in its scheme; `mix` says which of W8A8_MIX's two sets is run.

    Raises ShardError for a scheme without a kernel or an asymmetric weight, SchemeError for tensors that are none of
    the scheme's.
    """
    scheme = scheme_named(shard.scheme, shard.name)
    if kernels.name not in scheme.native:
        raise ShardError(f"{shard.name}: {kernels.name} has no kernel for {scheme.name}; load it with load_shard")
    _check_types(shard)
    option = Arithmetic.STATIC if mix == "static" else Arithmetic.DYNAMIC
    arithmetic = option if option in scheme.arithmetics else scheme.arithmetics[0]
    if arithmetic is Arithmetic.STATIC:
        return StaticLinear(shard, kernels, dtype)
    return (DynamicLinear if arithmetic is Arithmetic.DYNAMIC else FloatLinear)(shard, kernels)


def operands(shard: LinearShard) -> dict[Operand, torch.Tensor]:
    """A linear's tensors by what they are. Raises SchemeError where they are none of its scheme's."""
    variant = variant_with(shard.scheme, shard.tensors.keys(), shard.name)
    return {rule.operand: shard.tensors[rule.suffix] for rule in variant.tensors}


def _check_types(shard: LinearShard) -> None:
    weight = shard.tensors["weight"]
    for rule in variant_with(shard.scheme, shard.tensors.keys(), shard.name).tensors:
        tensor, name = shard.tensors[rule.suffix], f"{shard.name}.{rule.suffix}"
        if tensor.dtype not in {getattr(torch, TORCH[dtype]) for dtype in rule.dtypes}:
            raise ShardError(f"{name} is {tensor.dtype}, {shard.scheme} has {' or '.join(rule.dtypes)}")
        expected = prod(rule.shape.sizes(tuple(weight.shape), shard.block)[0])
        if tensor.numel() != expected:
            raise ShardError(
                f"{name} is {list(tensor.shape)}, expected {expected} of them for the weight {list(weight.shape)}; cut "
                "the set again"
            )
    offset = operands(shard).get(Operand.OFFSET)
    if offset is not None and _has_values(offset):
        raise ShardError(
            f"{shard.name}.weight_offset is not zero (the largest is {offset.abs().max().item():g}); weights with an "
            "offset are not supported: quantize them symmetrically"
        )


def _deq_scale(stored_N: torch.Tensor) -> torch.Tensor:
    """float32; where it is stored as I64, its low 32 bits are those of the float32."""
    return stored_N.to(torch.int32).view(torch.float32) if stored_N.dtype == torch.int64 else stored_N.float()


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether any is not 0; on the meta device there are none."""
    return not tensor.is_meta and bool(tensor.any())


def _constant(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)
