"""Element types that numpy lacks, as bit patterns: BF16 as uint16, F8_E4M3 as uint8."""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

_BF16_NAN = 0x7FC0

_STORAGE: dict[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F32": np.float32,
    "F16": np.float16,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}


def storage(dtype: str) -> type[np.generic]:
    """The numpy type that holds a safetensors type's bits."""
    return _STORAGE[dtype]


def bf16_to_f32(bits: Array) -> F32:
    """Widen BF16, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: F32) -> Array:
    """Round to the nearest BF16, ties to even; whatever is no number becomes the one NaN 0x7FC0."""
    bits = values.view(np.uint32)
    # A carry out of the lower half rounds up. Half of it is 0x8000, which an even upper half must stay short of.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    rounded[np.isnan(values)] = _BF16_NAN
    return rounded.astype(np.uint16)


@cache
def _e4m3_values() -> F32:
    """The 256 values of F8_E4M3 (OCP 8-bit floating point, E4M3: bias 7, no infinity, S.1111.111 is NaN)."""
    code = np.arange(256, dtype=np.int64)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float64)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code > 127, -magnitude, magnitude).astype(np.float32)


def to_f32(bits: Array, dtype: str) -> F32:
    """Values of a stored array as float32: exact for BF16, F16, F32, F8_E4M3 and I8."""
    if dtype == "BF16":
        return bf16_to_f32(bits)
    if dtype == "F8_E4M3":
        return _e4m3_values()[bits]
    return bits.astype(np.float32)
