"""Element types as safetensors names them."""

from math import prod

# Bits of one element. Names and widths: the safetensors format, `Dtype` of safetensors 0.8.
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

FLOATS = frozenset({"BF16", "F16", "F32"})

TORCH = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}
"""torch's names of the types in the table of schemes."""

# Adding R partial sums in BF16, one after another, against the unsplit BF16 layer's own error (benchmarks/accuracy.py):
# 1.12 times at R = 4, 1.29 at 8, 1.55 at 16; in float32 0.99 everywhere, for twice the bytes.
RANKS_IN_OWN_TYPE = 8
"""The partial sums of more ranks travel in float32, unless told otherwise, where the collective adds them."""


def itemsize(dtype: str) -> int:
    """Bytes of one element of a type that fills whole bytes (every type in the table of schemes does)."""
    return BITS[dtype] // 8


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * BITS[dtype] // 8
