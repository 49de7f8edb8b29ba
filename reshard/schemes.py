"""The split table: for every scheme, which tensors a linear has and how each is cut.

Shapes: I intermediate_size, H hidden_size, [out, in] = [I, H] for gate and up, [H, I] for down; (b, k) the scale
block. gate and up are column-parallel (cut along out), down is row-parallel (cut along in).

A new scheme is new rows here; the plan, the writer, merge and verify know no scheme by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from reshard.errors import SchemeError, UsageError
from reshard.model.naming import DOWN
from reshard.tensors.dtypes import FLOATS


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
class QuantSpec:
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

SCHEMES = tuple(dict.fromkeys(variant.scheme for variant in VARIANTS))
"""What a linear can be, in the words of `--scheme`, manifest and reports."""

BLOCK = (128, 128)
"""The scale block of every published block-scaled checkpoint: DeepSeek-V3's `weight_block_size`."""

FLOAT = "FLOAT"
"""The kind of a linear that is not quantized."""

WAY_OUT = (
    f"it splits {', '.join(SCHEMES)}: cut the BF16 or FP8 original, or a checkpoint whose dense layers are left "
    "unquantized"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def check_scheme(scheme: str) -> None:
    """Raises UsageError for a `--scheme` that is none of SCHEMES."""
    if scheme not in SCHEMES:
        raise UsageError(f"--scheme {scheme}: there are {', '.join(SCHEMES)}")


def check_kind(module: str, declared: QuantSpec, tensors: str = "") -> None:
    """Raises SchemeError, by the name it is given, for a kind that no variant is of. tensors: in words, or nothing."""
    if not is_split(declared.kind):
        said = f"{declared.kind} ({tensors})" if tensors else declared.kind
        raise SchemeError(f"{module}: {declared.said_by} says {said}, which this version does not split; {WAY_OUT}")


def is_split(kind: str) -> bool:
    """Whether a variant is of that kind."""
    return any(variant.kind == kind for variant in VARIANTS)


def scheme_of(kind: str) -> str:
    """The scheme of a kind; of a kind that is not split, its own name."""
    return next((variant.scheme for variant in VARIANTS if variant.kind == kind), kind)


def is_plain(found: Mapping[str, StoredTensor]) -> bool:
    """Whether a linear is a float weight and nothing else."""
    return found.keys() == {"weight"} and found["weight"].dtype in FLOATS


def match_variant(module: str, declared: QuantSpec, found: Mapping[str, StoredTensor]) -> Variant:
    """The variant of a known kind that a linear's tensors, by suffix, are.

    Raises SchemeError naming the tensor where one is unknown, missing, of another type, or of another shape than
    the weight's calls for.
    """
    variant = _closest(declared, found)
    problem = _mismatch(module, variant, declared, found)
    if problem is not None:
        raise SchemeError(problem)
    return variant


def fitting_variant(declared: QuantSpec, found: Mapping[str, StoredTensor]) -> Variant | None:
    """The variant that a linear's tensors are, if what is declared of it fits them."""
    if not is_split(declared.kind):
        return None
    variant = _closest(declared, found)
    return variant if _mismatch("", variant, declared, found) is None else None


def _closest(declared: QuantSpec, found: Mapping[str, StoredTensor]) -> Variant:
    candidates = [variant for variant in VARIANTS if variant.kind == declared.kind]
    return min(candidates, key=lambda candidate: len(candidate.suffixes ^ found.keys()))


def _mismatch(module: str, variant: Variant, declared: QuantSpec, found: Mapping[str, StoredTensor]) -> str | None:
    """The first tensor that keeps a linear from being the variant."""
    for suffix in sorted(found.keys() - variant.suffixes):
        return (
            f"{module}.{suffix} in {found[suffix].file}: not a tensor of {variant.scheme} ({declared.said_by}), "
            f"which has {', '.join(sorted(variant.suffixes))}"
        )
    for suffix in sorted(variant.suffixes - found.keys()):
        return (
            f"{module}.{suffix}: missing; {declared.said_by} makes the layer {variant.scheme}, and the checkpoint "
            f"has only its {', '.join(sorted(found))}; download the file that holds it again"
        )
    for rule in variant.tensors:
        dtype, file = found[rule.suffix].dtype, found[rule.suffix].file
        if dtype not in rule.dtypes:
            return (
                f"{module}.{rule.suffix} in {file}: is {dtype}, {declared.said_by} makes it {variant.scheme}, whose "
                f"{rule.suffix} is {' or '.join(sorted(rule.dtypes))}; the two are not of one checkpoint"
            )
    weight = found["weight"].shape
    if len(weight) != 2 or 0 in weight:
        return f"{module}.weight in {found['weight'].file}: shape {list(weight)}, expected a matrix [out, in]"
    problems = (_misshapen(module, rule, found[rule.suffix], weight, declared) for rule in variant.tensors)
    return next((problem for problem in problems if problem is not None), None)


def _misshapen(
    module: str, rule: TensorRule, found: StoredTensor, weight: tuple[int, ...], declared: QuantSpec
) -> str | None:
    out_features, in_features = weight
    allowed: list[tuple[int, ...]]
    if rule.shape is Shape.BLOCKS:
        if declared.block is None:
            return f"{module}.{rule.suffix}: {declared.said_by} gives no block size for its scales"
        rows, columns = declared.block
        allowed = [(-(-out_features // rows), -(-in_features // columns))]
    else:
        options: dict[Shape, list[tuple[int, ...]]] = {
            Shape.OUT_IN: [weight],
            Shape.CHANNEL: [(out_features,), (out_features, 1)],
            Shape.OUT: [(out_features,)],
            Shape.ONE: [(1,), ()],
        }
        allowed = options[rule.shape]
    if found.shape in allowed:
        return None
    wanted = " or ".join(str(list(option)) for option in allowed)
    problem = f"{module}.{rule.suffix} in {found.file}: shape {list(found.shape)}"
    group = group_size(found.shape, weight) if rule.shape is Shape.CHANNEL else None
    if group is not None:
        return (
            f"{problem}: scales by groups of {group} along in; {declared.said_by} is split with one scale per row, "
            f"{wanted}; quantize per channel (group_size 0), or cut the BF16 or FP8 original"
        )
    blocks = f" (blocks of {declared.block[0]} x {declared.block[1]})" if declared.block else ""
    return (
        f"{problem}, with a weight of {list(weight)}{blocks} it must be {wanted}, by {declared.said_by}; the two are "
        "not of one checkpoint"
    )


def group_size(scales: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """How many elements along in share a scale, where a row has several: [out, in / group]."""
    if len(scales) != 2 or len(weight) != 2 or scales[0] != weight[0] or scales[1] < 2 or weight[1] % scales[1]:
        return None
    return weight[1] // scales[1]
