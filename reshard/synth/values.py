"""A tensor's values, block by block: the same for a seed and a name, whatever file the tensor is in.

Values are drawn from tables by random bits. Only numpy's bit generators are used, whose streams are fixed for good.
"""

from collections.abc import Iterator
from functools import cache
from math import prod
from statistics import NormalDist

import numpy as np
from blake3 import blake3

from reshard.model.parts import DENSE_FFN
from reshard.schemes.table import Operand
from reshard.synth.schemes import Fill, TensorSpec
from reshard.tensors.numeric import F32, Array, from_f32, storage

_BLOCK_ELEMENTS = 1 << 20
_TABLE = 1 << 16  # entries: one for each value of 16 random bits
_WEIGHT_DEVIATION = 0.02
_FP8_DEVIATION = 64.0  # times a scale of about 1e-3; the largest draw, 4.3 deviations, is still below 448
_NORM_DEVIATION = np.float32(0.1)
_SCALE = 1e-3
_INPUT_SCALE = 1e-2
_LARGEST_OFFSET = 32


def blocks(tensor: TensorSpec, seed: int) -> Iterator[Array]:
    """The tensor's elements in order, a few megabytes at a time."""
    module = tensor.name.rpartition(".")[0]
    match tensor.fill:
        case Operand.WEIGHT if tensor.dtype == "I8":
            yield from _int8_rows(tensor.name, tensor.shape, seed)
        case Operand.WEIGHT | Fill.WEIGHT:
            yield from _from_table(tensor.name, _weights(tensor.dtype), tensor.shape, seed)
        case Fill.NORM:
            yield from _from_table(
                tensor.name, from_f32(1 + _normal() * _NORM_DEVIATION, tensor.dtype), tensor.shape, seed
            )
        case Operand.SCALE if tensor.shape == (1,):
            yield from _from_table(f"{_input_of(module)}.weight_scale", _scales(tensor.dtype), tensor.shape, seed)
        case Operand.SCALE | Fill.FREQUENCIES:
            yield from _from_table(tensor.name, _scales(tensor.dtype), tensor.shape, seed)
        case Operand.OFFSET:
            yield np.zeros(tensor.shape, storage(tensor.dtype))
        case Operand.INPUT_SCALE:
            yield from_f32(np.array([_input_scale(module, seed)], np.float32), tensor.dtype)
        case Operand.INPUT_OFFSET:
            yield from_f32(np.array([_input_offset(module, seed)], np.float32), tensor.dtype)
        case Operand.BIAS:
            for rows in _int8_rows(f"{module}.weight", tensor.weight, seed):
                yield (rows.sum(axis=1, dtype=np.int64) * -_input_offset(module, seed)).astype(np.int32)
        case Operand.OUTPUT_SCALE:
            for scale in _from_table(f"{module}.weight_scale", _scales("F32"), (tensor.weight[0], 1), seed):
                yield scale[:, 0] * _input_scale(module, seed)


def _bits(name: str, seed: int) -> np.random.SFC64:
    return np.random.SFC64(int.from_bytes(blake3(f"{seed}\n{name}".encode()).digest(length=16), "little"))


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Shapes of successive blocks of whole rows."""
    rows = max(1, _BLOCK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield (min(rows, shape[0] - start), *shape[1:])


def _draw(bits: np.random.SFC64, kind: type[np.generic], shape: tuple[int, ...]) -> Array:
    """Random bits as whole numbers of that type."""
    count = prod(shape)
    words = np.asarray(bits.random_raw(-(-count * np.dtype(kind).itemsize // 8)))
    return words.view(kind)[:count].reshape(shape)


def _int8_rows(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Array]:
    bits = _bits(name, seed)
    for block in _row_blocks(shape):
        yield _draw(bits, np.int8, block)


def _from_table(name: str, table: Array, shape: tuple[int, ...], seed: int) -> Iterator[Array]:
    bits = _bits(name, seed)
    for block in _row_blocks(shape):
        # The mode saves a pass that looks for indices out of range: 16 bits cannot be.
        yield table.take(_draw(bits, np.uint16, block), mode="clip")


def _input_of(module: str) -> str:
    """The module whose name stands for what linears that may be stacked share: the first of them."""
    parent, _, role = module.rpartition(".")
    fused = DENSE_FFN.fused(role)
    return f"{parent}.{fused.roles[0].name}" if fused is not None else module


def _input_scale(module: str, seed: int) -> np.float32:
    draw = int(_bits(f"{_input_of(module)}.input_scale", seed).random_raw()) % _TABLE
    return np.float32(_INPUT_SCALE * (0.5 + draw / _TABLE))


def _input_offset(module: str, seed: int) -> int:
    """Not 0, so that a bias that is lost or added twice shows."""
    draw = int(_bits(f"{_input_of(module)}.input_offset", seed).random_raw()) % (2 * _LARGEST_OFFSET)
    return draw - _LARGEST_OFFSET if draw < _LARGEST_OFFSET else draw - _LARGEST_OFFSET + 1


@cache
def _normal() -> F32:
    """Quantiles of the normal distribution, evenly spaced in probability."""
    inverse = NormalDist().inv_cdf
    upper = [inverse(0.5 + (i + 0.5) / _TABLE) for i in range(_TABLE // 2)]
    return np.array([*(-value for value in reversed(upper)), *upper], np.float32)


@cache
def _weights(dtype: str) -> Array:
    return from_f32(_normal() * np.float32(_FP8_DEVIATION if dtype == "F8_E4M3" else _WEIGHT_DEVIATION), dtype)


@cache
def _scales(dtype: str) -> Array:
    return from_f32(((np.arange(_TABLE) / _TABLE + 0.5) * _SCALE).astype(np.float32), dtype)
