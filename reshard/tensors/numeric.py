"""Values of stored elements, in numpy: of types that it lacks, by ml_dtypes."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_BF16_NAN = 0x7FC0

_TYPES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": ml_dtypes.float8_e8m0fnu,  # in the table of schemes only exponents, by tools that lack the type
    "F32": np.float32,
    "F16": np.float16,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
_BITS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16}


def storage(dtype: str) -> type[np.generic]:
    """The numpy type that holds a safetensors type's bits: unsigned integers for what numpy lacks."""
    found = np.dtype(_TYPES[dtype])
    return found.type if found.kind in "fi" else _BITS[found.itemsize]


def from_f32(values: F32, dtype: str) -> Array:
    """Round to the nearest of a type, ties to even, as bits."""
    return values.astype(_TYPES[dtype]).view(storage(dtype))


def f32_to_bf16(values: F32) -> Array:
    """BF16; whatever is no number becomes the one NaN 0x7FC0."""
    rounded = from_f32(values, "BF16")
    rounded[np.isnan(values)] = _BF16_NAN
    return rounded


@cache
def _values_of_bytes(dtype: str) -> F32:
    """The 256 values of a type of one byte: looking them up is faster than ml_dtypes' conversion."""
    values: F32 = np.arange(256, dtype=np.uint8).view(_TYPES[dtype]).astype(np.float32)
    return values


def to_f32(bits: Array, dtype: str) -> F32:
    """Values of a stored array as float32: exact for all but I32 and I64."""
    if bits.dtype == np.uint8:
        return _values_of_bytes(dtype).take(bits)
    values: F32 = bits.view(_TYPES[dtype]).astype(np.float32)
    return values
