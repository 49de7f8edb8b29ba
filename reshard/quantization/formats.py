"""Formats by the tensors that a linear has: the schemes that are split, and those that are known and are not."""

import re
from collections.abc import Callable, Mapping

from reshard.schemes import BLOCK, VARIANTS, QuantSpec, StoredTensor, Variant, fitting_variant, group_size, is_plain
from reshard.tensors.dtypes import FLOATS

_U8, _F8 = frozenset({"U8", "I8"}), frozenset({"F8_E4M3"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})  # shared scales of the OCP's MX formats
_ANY: frozenset[str] = frozenset()

_Tensors = Mapping[str, StoredTensor]


def _has(**dtypes: frozenset[str]) -> Callable[[_Tensors], bool]:
    return lambda found: all(s in found and (not kinds or found[s].dtype in kinds) for s, kinds in dtypes.items())


def _one_scale(found: _Tensors) -> bool:
    return _has(weight=_F8, weight_scale=_ANY)(found) and found["weight_scale"].shape in {(), (1,), (1, 1)}


def _fake(found: _Tensors) -> bool:
    return _has(weight=FLOATS, weight_scale=_ANY)(found) and "weight_offset" not in found


def _alone(found: _Tensors) -> bool:
    return found.keys() == {"weight"} and found["weight"].dtype in _F8


def _by_groups(found: _Tensors) -> bool:
    int8 = _has(weight=frozenset({"I8"}), weight_scale=_ANY)(found)
    return int8 and group_size(found["weight_scale"].shape, found["weight"].shape) is not None


def _weights_alone(found: _Tensors) -> bool:
    return found.keys() == {"weight", "weight_scale", "weight_offset"} and found["weight"].dtype == "I8"


# Told by what each tool writes; the first that fits.
_NOT_SPLIT: tuple[tuple[str, Callable[[_Tensors], bool]], ...] = (
    ("NVFP4", _has(weight=_U8, weight_scale=_F8, weight_scale_2=_ANY)),  # ModelOpt
    ("NVFP4", _has(weight_packed=_U8, weight_global_scale=_ANY)),  # compressed-tensors
    ("MXFP4", _has(weight_packed=_U8, weight_scale=_EXPONENTS)),
    ("MXFP4", _has(weight=frozenset({"U8"}), weight_scale=_EXPONENTS)),  # Quark, ModelSlim
    ("MXFP8", _has(weight=_F8, weight_scale=_EXPONENTS)),
    ("FP8 in blocks with UE8M0 scales", _has(weight=_F8, weight_scale_inv=_EXPONENTS)),
    ("GPTQ", _has(qweight=_ANY, g_idx=_ANY)),
    ("AWQ or GPTQ", _has(qweight=_ANY, qzeros=_ANY)),
    ("W4A16 of compressed-tensors", _has(weight_packed=frozenset({"I32"}))),
    ("fake-quantized (float weights beside their scales: not compressed yet)", _fake),  # compressed-tensors, frozen
    ("sparse 2:4 of compressed-tensors", _has(compressed=_ANY, bitmask=_ANY)),
    ("MLX", _has(weight=frozenset({"U32", "I32"}), scales=_ANY, biases=_ANY)),
    ("torchao", _has(_weight_qdata=_ANY)),
    ("bitsandbytes int8", _has(weight=_ANY, SCB=_ANY)),
    ("HQQ", _has(W_q=_ANY)),
    ("FP8 E5M2", _has(weight=frozenset({"F8_E5M2"}))),
    ("FP8 with one scale per tensor", _one_scale),
    ("FP8 without scales", _alone),
    ("int8 with scales by groups along in", _by_groups),
    ("W8A16", _weights_alone),  # ModelSlim's, of the very tensors of its W8A8_DYNAMIC
)


# Endings of the names of what tools store in a quantized weight's place, or beside it. One too many does no harm.
_QUANTIZED = re.compile(
    r"[._](?:\w*scale\w*|qweight|qzeros|\w*packed|g_idx|SCB|absmax|\w*quant\w*|W_q|codebooks?|codes|trellis|\w*blocks|"
    r"bitmask|\w*zero_point|\w*qdata|deq_scale|biases|centroids|_data)$"
)


def is_quantized_name(name: str) -> bool:
    """Whether a tensor of such a name is part of a quantized weight."""
    return _QUANTIZED.search(name) is not None


def variants_of(found: _Tensors) -> tuple[Variant, ...]:
    """The variants whose tensors these are. Where a scale stands for a block, a block of the published size."""
    return tuple(v for v in VARIANTS if fitting_variant(as_kind(v), found) == v)


def as_kind(variant: Variant, block: tuple[int, int] = BLOCK, said_by: str = "") -> QuantSpec:
    """What is declared of a linear that is said to be of a variant."""
    return QuantSpec(variant.kind, block if any(rule.in_blocks for rule in variant.tensors) else None, said_by)


def names_of_formats(found: _Tensors) -> tuple[str, ...]:
    """What the tensors may be, the schemes first."""
    if is_plain(found):
        return (f"plain {found['weight'].dtype}",)
    schemes = dict.fromkeys(variant.scheme for variant in variants_of(found))
    other = next((name for name, fits in _NOT_SPLIT if fits(found)), None)
    return (*schemes, *((other,) if other else ()))


def tensors_text(found: _Tensors) -> str:
    """A linear's tensors: suffix, type and shape of each, the weight first."""
    return ", ".join(f"{suffix} {tensor.dtype} {list(tensor.shape)}" for suffix, tensor in _ordered(found))


def types_text(found: _Tensors) -> str:
    """The same without the shapes."""
    return ", ".join(f"{suffix} {tensor.dtype}" for suffix, tensor in _ordered(found))


def _ordered(found: _Tensors) -> list[tuple[str, StoredTensor]]:
    return sorted(found.items(), key=lambda item: (item[0] != "weight", item[0]))
