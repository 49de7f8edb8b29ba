"""The split table: for every scheme, which tensors a linear has and how each is cut.

Shapes: I intermediate_size, H hidden_size, [out, in] = [I, H] for gate and up, [H, I] for down; (b, k) the scale
block. gate and up are column-parallel (cut along out), down is row-parallel (cut along in).

A new scheme is new rows here; the plan, the writer, merge and verify know no scheme by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from reshard.dtypes import FLOATS
from reshard.errors import SchemeError
from reshard.naming import DOWN


class Cut(Enum):
    """How one stored tensor is dealt to the ranks."""

    ROWS = "rows"  # dim 0
    COLUMNS = "columns"  # dim 1
    REPLICATED = "replicated"  # every rank holds all of it
    RANK_0 = "rank 0 only"  # the others hold zeros: partial sums are added

    @property
    def dim(self) -> int | None:
        """The dimension that is cut, if one is."""
        return {Cut.ROWS: 0, Cut.COLUMNS: 1}.get(self)


class Shape(Enum):
    """A tensor's shape in terms of its linear's."""

    OUT_IN = "[out, in]"
    CHANNEL = "[out] or [out, 1]"
    OUT = "[out]"
    ONE = "[1]"
    BLOCKS = "[ceil(out/b), ceil(in/k)]"


@dataclass(frozen=True)
class TensorRule:
    """One row of the table: a suffix, its shape and types, its cut in a column- and in a row-parallel linear."""

    suffix: str
    shape: Shape
    dtypes: frozenset[str]
    column: Cut
    row: Cut

    def cut(self, role: str) -> Cut:
        """The cut for gate_proj, up_proj or down_proj."""
        return self.row if role == DOWN else self.column

    @property
    def in_blocks(self) -> bool:
        """Whether one element stands for a block of the weight."""
        return self.shape is Shape.BLOCKS


@dataclass(frozen=True)
class Declared:
    """What a description or config says of one linear: a kind of `VARIANTS`, its scale block, who says it."""

    kind: str
    block: tuple[int, int] | None
    said_by: str


@dataclass(frozen=True)
class Variant:
    """A set of tensors that a tool writes for a kind of linear."""

    scheme: str
    kind: str
    tensors: tuple[TensorRule, ...]

    @property
    def suffixes(self) -> frozenset[str]:
        """The suffixes of its tensors."""
        return frozenset(rule.suffix for rule in self.tensors)


def _types(*names: str) -> frozenset[str]:
    return frozenset(names)


_I8, _F8, _F32, _I32 = _types("I8"), _types("F8_E4M3"), _types("F32"), _types("I32")
_ROWS, _COLUMNS, _ALL, _RANK_0 = Cut.ROWS, Cut.COLUMNS, Cut.REPLICATED, Cut.RANK_0


def _weight(dtypes: frozenset[str]) -> TensorRule:
    return TensorRule("weight", Shape.OUT_IN, dtypes, _ROWS, _COLUMNS)


_SCALE = TensorRule("weight_scale", Shape.CHANNEL, FLOATS, _ROWS, _ALL)
_OFFSET = TensorRule("weight_offset", Shape.CHANNEL, FLOATS, _ROWS, _ALL)
_BLOCK_SCALE = TensorRule("weight_scale", Shape.BLOCKS, FLOATS, _ROWS, _COLUMNS)
_BLOCK_SCALE_INV = TensorRule("weight_scale_inv", Shape.BLOCKS, FLOATS, _ROWS, _COLUMNS)
_INPUT_SCALE = TensorRule("input_scale", Shape.ONE, FLOATS, _ALL, _ALL)
_INPUT_OFFSET = TensorRule("input_offset", Shape.ONE, FLOATS | _I8 | _I32, _ALL, _ALL)
_INPUT_ZERO_POINT = TensorRule("input_zero_point", Shape.ONE, _I8, _ALL, _ALL)
_QUANT_BIAS = TensorRule("quant_bias", Shape.OUT, _I32, _ROWS, _RANK_0)
_DEQ_SCALE = TensorRule("deq_scale", Shape.OUT, _types("F32", "I64"), _ROWS, _ALL)

_STATIC = (_weight(_I8), _INPUT_SCALE, _INPUT_OFFSET, _QUANT_BIAS, _DEQ_SCALE)

# Kinds: ModelSlim's type strings as its description has them; for config.json's quantization_config the names that
# reshard.quantization gives them.
VARIANTS = (
    Variant("bf16", "FLOAT", (_weight(FLOATS),)),
    Variant("w8a8_dynamic", "W8A8_DYNAMIC", (_weight(_I8), _SCALE, _OFFSET)),
    Variant("w8a8_static", "W8A8", _STATIC),
    Variant("w8a8_static", "W8A8", (*_STATIC, _SCALE, _OFFSET)),
    Variant("w8a8_mix", "W8A8_MIX", (*_STATIC, _SCALE, _OFFSET)),
    Variant("w8a8_dynamic", "int8-channel-dynamic", (_weight(_I8), _SCALE)),
    Variant("w8a8_static", "int8-channel-static", (_weight(_I8), _SCALE, _INPUT_SCALE)),
    Variant("w8a8_static", "int8-channel-static-asymmetric", (_weight(_I8), _SCALE, _INPUT_SCALE, _INPUT_ZERO_POINT)),
    Variant("fp8_block", "fp8-block", (_weight(_F8), _BLOCK_SCALE_INV)),
    Variant("fp8_block", "fp8-block-compressed", (_weight(_F8), _BLOCK_SCALE)),
    Variant("fp8_channel", "fp8-channel", (_weight(_F8), _SCALE)),
    Variant("int8_block", "int8-block", (_weight(_I8), _BLOCK_SCALE_INV)),
)

KINDS = frozenset(variant.kind for variant in VARIANTS)


def check_kind(module: str, declared: Declared) -> None:
    """Raises SchemeError, by the name it is given, for a kind that no variant is of."""
    if declared.kind not in KINDS:
        raise SchemeError(
            f"{module}: {declared.said_by} says {declared.kind}, which this version does not split; "
            f"it knows {', '.join(sorted(KINDS))}"
        )


@dataclass(frozen=True)
class Found:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def match_variant(module: str, declared: Declared, found: Mapping[str, Found]) -> Variant:
    """The variant of a known kind that a linear's tensors, by suffix, are.

    Raises SchemeError naming the tensor where one is unknown, missing, of another type, or of another shape than
    the weight's calls for.
    """
    candidates = [variant for variant in VARIANTS if variant.kind == declared.kind]
    variant = min(candidates, key=lambda candidate: len(candidate.suffixes ^ found.keys()))
    for suffix in sorted(found.keys() - variant.suffixes):
        raise SchemeError(
            f"{module}.{suffix} in {found[suffix].file}: not a tensor of {variant.scheme} ({declared.said_by}), "
            f"which has {', '.join(sorted(variant.suffixes))}"
        )
    for suffix in sorted(variant.suffixes - found.keys()):
        raise SchemeError(
            f"{module}.{suffix}: missing; {declared.said_by} makes the layer {variant.scheme}, and the checkpoint "
            f"has only its {', '.join(sorted(found))}; download what is missing again"
        )
    for rule in variant.tensors:
        dtype, file = found[rule.suffix].dtype, found[rule.suffix].file
        if dtype not in rule.dtypes:
            raise SchemeError(
                f"{module}.{rule.suffix} in {file}: is {dtype}, {declared.said_by} makes it {variant.scheme}, whose "
                f"{rule.suffix} is {' or '.join(sorted(rule.dtypes))}; is the file of this checkpoint?"
            )
    weight = found["weight"].shape
    if len(weight) != 2 or 0 in weight:
        raise SchemeError(
            f"{module}.weight in {found['weight'].file}: shape {list(weight)}, a matrix [out, in] is wanted"
        )
    for rule in variant.tensors:
        _check_shape(module, rule, found[rule.suffix], weight, declared.block)
    return variant


def _check_shape(
    module: str, rule: TensorRule, found: Found, weight: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    out_features, in_features = weight
    allowed: list[tuple[int, ...]]
    if rule.shape is Shape.BLOCKS:
        if block is None:
            raise SchemeError(f"{module}.{rule.suffix}: config.json gives no block size for its scales")
        allowed = [(-(-out_features // block[0]), -(-in_features // block[1]))]
    else:
        options: dict[Shape, list[tuple[int, ...]]] = {
            Shape.OUT_IN: [weight],
            Shape.CHANNEL: [(out_features,), (out_features, 1)],
            Shape.OUT: [(out_features,)],
            Shape.ONE: [(1,), ()],
        }
        allowed = options[rule.shape]
    if found.shape not in allowed:
        wanted = " or ".join(str(list(option)) for option in allowed)
        raise SchemeError(
            f"{module}.{rule.suffix} in {found.file}: shape {list(found.shape)}, with a weight of {list(weight)} it "
            f"must be {wanted}; download or quantise it again"
        )
