"""Formats by the tensors that a linear has: the schemes that are split, and those that are known and are not."""

import re
from collections.abc import Callable, Iterable, Mapping

from reshard.schemes.match import QuantSpec, Stored, fitting_variant, group_size, is_plain
from reshard.schemes.table import BLOCK, VARIANTS, Variant

_FLOAT, _INT, _MX = "BF16 F16 F32", "U8 I8", "U8 F8_E8M0"  # _MX: the exponents that blocks share in OCP's MX formats
_W8A16 = {"weight": "I8", "weight_scale": "", "weight_offset": ""}


def _by_groups(found: Stored) -> bool:
    return group_size(found["weight_scale"].shape, found["weight"].shape) is not None


# By what each tool writes: types by suffix ("": any), and what else must hold; the first that fits.
_NOT_SPLIT: tuple[tuple[str, Mapping[str, str], Callable[[Stored], bool]], ...] = (
    ("NVFP4", {"weight": _INT, "weight_scale": "F8_E4M3", "weight_scale_2": ""}, bool),  # ModelOpt
    ("NVFP4", {"weight_packed": _INT, "weight_global_scale": ""}, bool),  # compressed-tensors
    ("MXFP4", {"weight_packed": _INT, "weight_scale": _MX}, bool),
    ("MXFP4", {"weight": "U8", "weight_scale": _MX}, bool),  # Quark, ModelSlim
    ("GPTQ", {"qweight": "", "g_idx": ""}, bool),
    ("AWQ or GPTQ", {"qweight": "", "qzeros": ""}, bool),
    ("W4A16 of compressed-tensors", {"weight_packed": "I32"}, bool),
    (
        "fake-quantized (float weights beside their scales: not compressed yet)",  # compressed-tensors, frozen
        {"weight": _FLOAT, "weight_scale": ""},
        lambda found: "weight_offset" not in found,
    ),
    ("sparse 2:4 of compressed-tensors", {"compressed": "", "bitmask": ""}, bool),
    ("MLX", {"weight": "U32 I32", "scales": "", "biases": ""}, bool),
    ("torchao", {"_weight_qdata": ""}, bool),
    ("bitsandbytes int8", {"weight": "", "SCB": ""}, bool),
    ("HQQ", {"W_q": ""}, bool),
    ("FP8 E5M2", {"weight": "F8_E5M2"}, bool),
    ("FP8 without scales", {"weight": "F8_E4M3"}, lambda found: len(found) == 1),
    ("int8 with scales by groups along in", {"weight": "I8", "weight_scale": ""}, _by_groups),
    ("W8A16", _W8A16, lambda found: found.keys() == _W8A16.keys()),  # ModelSlim's: its W8A8_DYNAMIC has these, too
)

# Endings of the names of what tools store in a quantized weight's place, or beside it. One too many does no harm.
_QUANTIZED = re.compile(
    r"[._](?:\w*scale\w*|qweight|qzeros|\w*packed|g_idx|SCB|absmax|\w*quant\w*|W_q|codebooks?|codes|trellis|\w*blocks|"
    r"bitmask|\w*zero_point|\w*qdata|deq_scale|biases|centroids|_data)$"
)


def needs_block(kind: str) -> bool:
    """Whether scales of the kind stand for blocks whose size must be said."""
    return any(variant.in_blocks and variant.block is None for variant in VARIANTS if variant.kind == kind)


def is_quantized_name(name: str) -> bool:
    """Whether a tensor of such a name is part of a quantized weight."""
    return _QUANTIZED.search(name) is not None


def as_kind(variant: Variant, block: tuple[int, int] = BLOCK, said_by: str = "") -> QuantSpec:
    """What is declared of a linear that is said to be of a variant."""
    return QuantSpec(variant.kind, block if needs_block(variant.kind) else None, said_by)


def spec_of_scheme(scheme: str, blocks: Iterable[tuple[int, int]], said_by: str, found: Stored) -> QuantSpec:
    """What is declared of a linear that is said to be of a scheme: what its tensors fit, if any."""
    specs = [as_kind(v, block, said_by) for block in blocks for v in VARIANTS if v.scheme == scheme]
    return next((spec for spec in specs if fitting_variant(spec, found) is not None), specs[0])


def variants_of(found: Stored) -> tuple[Variant, ...]:
    """The variants whose tensors these are. Where a scale stands for a block, a block of the published size."""
    return tuple(v for v in VARIANTS if fitting_variant(as_kind(v), found) == v)


def names_of_formats(found: Stored) -> tuple[str, ...]:
    """What the tensors may be, the schemes first."""
    if is_plain(found):
        return (f"plain {found['weight'].dtype}",)
    schemes = dict.fromkeys(variant.scheme for variant in variants_of(found))
    others = (name for name, types, holds in _NOT_SPLIT if _has(found, types) and holds(found))
    return (*schemes, *[*others][:1])


def _has(found: Stored, types: Mapping[str, str]) -> bool:
    return all(s in found and (not some or found[s].dtype in some.split()) for s, some in types.items())


def tensors_text(found: Stored, *, shapes: bool = True) -> str:
    """A linear's tensors: suffix, type and shape of each, the weight first."""
    ordered = sorted(found.items(), key=lambda item: (item[0] != "weight", item[0]))
    return ", ".join(f"{suffix} {t.dtype}" + (f" {list(t.shape)}" if shapes else "") for suffix, t in ordered)
