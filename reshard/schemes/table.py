"""The table of schemes: what tools write for a linear, how each tensor is cut, what computes it.

Shapes: [out, in] is a linear's weight; (b, k) the block of it that one scale stands for. A column-parallel linear
(gate, up) is cut along out, a row-parallel one (down) along in.

A new scheme is rows here, and an arithmetic of its own where it has one. What is not here is not supported.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from functools import cache

from reshard.errors import SchemeError


class Placement(Enum):
    """How one stored tensor is dealt to the ranks."""

    ROWS = "rows"  # dim 0
    COLUMNS = "columns"  # dim 1
    REPLICATED = "replicated"  # every rank holds all of it
    RANK_0 = "rank 0 only"  # the others hold zeros: partial sums are added

    @property
    def dim(self) -> int | None:
        """The dimension that is cut, if one is."""
        return 0 if self is Placement.ROWS else 1 if self is Placement.COLUMNS else None


class Shape(Enum):
    """A tensor's shape in terms of its linear's."""

    OUT_IN = "[out, in]"
    CHANNEL = "[out] or [out, 1]"
    OUT = "[out]"
    ONE = "[1]"
    BLOCKS = "[ceil(out/b), ceil(in/k)]"

    def sizes(self, weight: tuple[int, ...], block: tuple[int, int] | None) -> tuple[tuple[int, ...], ...]:
        """The shapes that it may be for a weight [out, in], first what tools write; none of an unknown block."""
        out_features, in_features = weight
        if self is Shape.BLOCKS:
            return ((-(-out_features // block[0]), -(-in_features // block[1])),) if block else ()
        options: dict[Shape, tuple[tuple[int, ...], ...]] = {
            Shape.OUT_IN: (weight,),
            Shape.CHANNEL: ((out_features, 1), (out_features,)),
            Shape.OUT: ((out_features,),),
            Shape.ONE: ((1,), ()),
        }
        return options[self]


class Operand(Enum):
    """What a tensor is to the arithmetic of its linear."""

    WEIGHT = "weight"
    SCALE = "the weight is multiplied by it"
    OFFSET = "subtracted from the weight"
    INPUT_SCALE = "tokens are divided by it"
    INPUT_OFFSET = "added to the divided tokens"
    BIAS = "int32, added to the sums"
    OUTPUT_SCALE = "the sums are multiplied by it: input scale * weight scale"


class Arithmetic(Enum):
    """What a linear computes of tokens x."""

    FLOAT = "x @ weight^T"
    SCALED = "x @ (weight * scale)^T"
    DYNAMIC = "int8 tokens, one scale for each token: (q @ weight^T) * scale * token scale"
    STATIC = "int8 tokens, one scale and offset for all: (q @ weight^T + bias) * output scale"


@dataclass(frozen=True)
class TensorRule:
    """A suffix, what it is, its shape and types (the one that the tool writes first), its placements."""

    suffix: str
    operand: Operand
    shape: Shape
    dtypes: tuple[str, ...]
    column: Placement
    row: Placement

    @property
    def in_blocks(self) -> bool:
        """Whether one element stands for a block of the weight."""
        return self.shape is Shape.BLOCKS


@dataclass(frozen=True)
class Scheme:
    """What a linear can be, by the name that `--scheme`, manifests and reports have for it.

    arithmetics: the default, then what an option chooses. native: the backends that compute with the weights as they
    are stored; elsewhere weights that have a scale become BF16 at load. becomes: the schemes that `--weights` may make
    of it. option: the word of `--weights` that makes this one.
    """

    name: str
    arithmetics: tuple[Arithmetic, ...]
    native: frozenset[str]
    becomes: tuple[str, ...] = ()
    option: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether it is not quantized."""
        return self.arithmetics == (Arithmetic.FLOAT,)

    def runs_as(self, backend: str) -> Arithmetic:
        """The default arithmetic on a backend."""
        return self.arithmetics[0] if backend in self.native else Arithmetic.FLOAT


@dataclass(frozen=True)
class Variant:
    """A set of tensors that a tool writes for a linear of a scheme.

    name: its own, as `synth --scheme` takes it. kind: what is declared of such a linear: ModelSlim's type string, or a
    name for what the configs say that are listed in `said`, in the words of reshard.quantization. block: the scale
    block where the kind fixes it; else the config gives it.
    """

    name: str
    scheme: str
    kind: str
    tensors: tuple[TensorRule, ...]
    said: tuple[str, ...] = ()
    block: tuple[int, int] | None = None

    @property
    def suffixes(self) -> frozenset[str]:
        """The suffixes of its tensors."""
        return frozenset(rule.suffix for rule in self.tensors)

    @property
    def in_blocks(self) -> bool:
        """Whether its scales stand for blocks of the weight."""
        return any(rule.in_blocks for rule in self.tensors)

    def suffix(self, operand: Operand) -> str | None:
        """The tensor that is that operand."""
        return next((rule.suffix for rule in self.tensors if rule.operand is operand), None)


BACKENDS = ("cpu", "cuda", "npu")
"""Of the runtime."""

VLLM_ASCEND = "vLLM on Ascend"

_EVERYWHERE = frozenset((*BACKENDS, VLLM_ASCEND))
_NOWHERE: frozenset[str] = frozenset()
_CONVERTED = ("bf16", "w8a8_dynamic")

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", (Arithmetic.FLOAT,), _EVERYWHERE, _CONVERTED, "bf16"),
        Scheme("w8a8_dynamic", (Arithmetic.DYNAMIC,), _EVERYWHERE, (), "w8a8"),
        Scheme("w8a8_static", (Arithmetic.STATIC,), _EVERYWHERE),
        Scheme("w8a8_mix", (Arithmetic.DYNAMIC, Arithmetic.STATIC), _EVERYWHERE),
        Scheme("fp8_block", (Arithmetic.SCALED,), _NOWHERE, _CONVERTED),
        Scheme("fp8_channel", (Arithmetic.SCALED,), _NOWHERE, _CONVERTED),
        Scheme("fp8_tensor", (Arithmetic.SCALED,), _NOWHERE, _CONVERTED),
        Scheme("w8a8_mxfp8", (Arithmetic.SCALED,), frozenset({VLLM_ASCEND}), _CONVERTED),
        Scheme("int8_block", (Arithmetic.SCALED,), _NOWHERE, _CONVERTED),
    )
}

_ROWS, _COLUMNS, _ALL, _RANK_0 = Placement.ROWS, Placement.COLUMNS, Placement.REPLICATED, Placement.RANK_0
_F32, _BF16 = ("F32", "BF16", "F16"), ("BF16", "F32", "F16")


def _weight(*dtypes: str) -> TensorRule:
    return TensorRule("weight", Operand.WEIGHT, Shape.OUT_IN, dtypes, _ROWS, _COLUMNS)


def _channel(dtypes: tuple[str, ...]) -> TensorRule:
    return TensorRule("weight_scale", Operand.SCALE, Shape.CHANNEL, dtypes, _ROWS, _ALL)


def _blocks(suffix: str, *dtypes: str) -> TensorRule:
    return TensorRule(suffix, Operand.SCALE, Shape.BLOCKS, dtypes, _ROWS, _COLUMNS)


def _one(suffix: str, operand: Operand, *dtypes: str) -> TensorRule:
    return TensorRule(suffix, operand, Shape.ONE, dtypes, _ALL, _ALL)


_I8, _F8 = _weight("I8"), _weight("F8_E4M3")
_DYNAMIC = (_channel(_F32), TensorRule("weight_offset", Operand.OFFSET, Shape.CHANNEL, _F32, _ROWS, _ALL))
_STATIC = (
    _one("input_scale", Operand.INPUT_SCALE, *_F32),
    _one("input_offset", Operand.INPUT_OFFSET, *_F32, "I8", "I32"),
    TensorRule("quant_bias", Operand.BIAS, Shape.OUT, ("I32",), _ROWS, _RANK_0),
    TensorRule("deq_scale", Operand.OUTPUT_SCALE, Shape.OUT, ("F32", "I64"), _ROWS, _ALL),
)
_STATIC_INT8 = (_I8, _channel(_BF16), _one("input_scale", Operand.INPUT_SCALE, *_BF16))
_FP8_TENSOR = (_F8, _one("weight_scale", Operand.SCALE, *_F32))

# fmt: off
VARIANTS = (
    Variant("bf16", "bf16", "FLOAT", (_weight("BF16", "F16", "F32"),)),
    Variant("w8a8_dynamic", "w8a8_dynamic", "W8A8_DYNAMIC", (_I8, *_DYNAMIC)),
    Variant("w8a8_static", "w8a8_static", "W8A8", (_I8, *_STATIC)),
    Variant("w8a8_static_v0", "w8a8_static", "W8A8", (_I8, *_STATIC, *_DYNAMIC)),
    Variant("w8a8_mix", "w8a8_mix", "W8A8_MIX", (_I8, *_STATIC, *_DYNAMIC)),
    Variant("w8a8_compressed", "w8a8_dynamic", "int8-channel-dynamic", (_I8, _channel(_BF16)),
            ("compressed-tensors int8 channel dynamic", "w8a8_int8")),
    Variant("w8a8_static_compressed", "w8a8_static", "int8-channel-static", _STATIC_INT8,
            ("compressed-tensors int8 channel static",)),
    Variant("w8a8_static_asymmetric", "w8a8_static", "int8-channel-static-asymmetric",
            (*_STATIC_INT8, _one("input_zero_point", Operand.INPUT_OFFSET, "I8")),
            ("compressed-tensors int8 channel static asymmetric",)),
    Variant("fp8_block", "fp8_block", "fp8-block", (_F8, _blocks("weight_scale_inv", *_F32)),
            ("fp8 block dynamic", "w4afp8")),
    # `scale_fmt: ue8m0` of DeepSeek V3.2 and V4; earlier models keep such scales as F32.
    Variant("fp8_block_ue8m0", "fp8_block", "fp8-block", (_F8, _blocks("weight_scale_inv", "F8_E8M0")),
            ("fp8 block dynamic",)),
    Variant("fp8_block_compressed", "fp8_block", "fp8-block-compressed", (_F8, _blocks("weight_scale", *_BF16)),
            ("compressed-tensors float8 block dynamic",)),
    Variant("fp8_channel", "fp8_channel", "fp8-channel", (_F8, _channel(_BF16)),
            ("compressed-tensors float8 channel dynamic", "w8a8_fp8", "modelopt FP8_PER_CHANNEL_PER_TOKEN")),
    Variant("fp8_tensor", "fp8_tensor", "fp8-tensor-dynamic", _FP8_TENSOR,
            ("fp8 tensor dynamic", "compressed-tensors float8 tensor dynamic")),
    Variant("fp8_tensor_static", "fp8_tensor", "fp8-tensor-static",
            (*_FP8_TENSOR, _one("input_scale", Operand.INPUT_SCALE, *_F32)),
            ("fp8 tensor static", "compressed-tensors float8 tensor static", "modelopt FP8")),
    Variant("w8a8_mxfp8", "w8a8_mxfp8", "W8A8_MXFP8", (_F8, _blocks("weight_scale", "U8", "F8_E8M0")), block=(1, 32)),
    Variant("int8_block", "int8_block", "int8-block", (_I8, _blocks("weight_scale_inv", *_F32)), ("blockwise_int8",)),
)
# fmt: on

BLOCK = (128, 128)
"""The scale block of every published block-scaled checkpoint: DeepSeek-V3's `weight_block_size`."""

FLOAT = "FLOAT"
"""The kind of a linear that is not quantized."""

UNQUANTIZED = "bf16"
"""The scheme of weights that are not quantized, or no longer."""

WAY_OUT = (
    f"it splits {', '.join(SCHEMES)}: cut the BF16 or FP8 original, or a checkpoint whose dense layers are left "
    "unquantized"
)


def unknown_scheme(name: str) -> str:
    """What is said of a scheme that is not in the table."""
    return f"unknown scheme {name}; supported are {', '.join(SCHEMES)}"


def scheme_named(name: str, where: str) -> Scheme:
    """A row of SCHEMES. Raises SchemeError, which names `where`, for what is not in the table."""
    if name not in SCHEMES:
        raise SchemeError(f"{where}: {unknown_scheme(name)}")
    return SCHEMES[name]


def scheme_by_option(word: str) -> str:
    """The scheme that `--weights` calls so; what is no option's word is a scheme's name."""
    return next((scheme.name for scheme in SCHEMES.values() if scheme.option == word), word)


def variant_with(scheme: str, suffixes: Collection[str], where: str) -> Variant:
    """The variant of a scheme that has these tensors. Raises SchemeError, which names `where`."""
    scheme_named(scheme, where)
    found = [variant for variant in VARIANTS if variant.scheme == scheme]
    for variant in found:
        if variant.suffixes == set(suffixes):
            return variant
    expected = " or ".join(", ".join(sorted(variant.suffixes)) for variant in found)
    raise SchemeError(f"{where}: {scheme} with {', '.join(sorted(suffixes))}; expected {expected}")


@cache
def told_by_tensors(scheme: str) -> bool:
    """Whether nothing else need be said: no other scheme has such tensors, and no scale stands for an unsaid block."""
    if any(variant.in_blocks and variant.block is None for variant in VARIANTS if variant.scheme == scheme):
        return False
    ours, others = ([v for v in VARIANTS if (v.scheme == scheme) is own] for own in (True, False))
    return not any(_alike(one, other) for one in ours for other in others)


def _alike(one: Variant, other: Variant) -> bool:
    rules = {rule.suffix: rule for rule in other.tensors}
    return one.suffixes == other.suffixes and all(
        rule.shape is rules[rule.suffix].shape and {*rule.dtypes} & {*rules[rule.suffix].dtypes} for rule in one.tensors
    )


def kind_said(words: str) -> str | None:
    """The kind of what a config says, in the words of the variants' `said`."""
    return next((variant.kind for variant in VARIANTS if words in variant.said), None)


def summary(schemes: Collection[str]) -> str:
    """One word for all linears: the scheme of those that are quantized, `mixed` if there are several."""
    quantized = {scheme for scheme in schemes if not scheme_named(scheme, "").is_float}
    return "mixed" if len(quantized) > 1 else next(iter(quantized or schemes))
