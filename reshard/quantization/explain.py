"""Why a linear is not cut: both sides by name, and what would mend it."""

from collections.abc import Mapping, Sequence

from reshard.errors import SchemeError
from reshard.model.naming import CONFIG
from reshard.quantization.description import DESCRIPTION, is_description
from reshard.quantization.formats import names_of_formats, tensors_text, types_text, variants_of
from reshard.quantization.methods import NO_BLOCK_SIZE
from reshard.quantization.modelopt import FP8_PB_WO
from reshard.schemes import (
    FLOAT,
    SCHEMES,
    VARIANTS,
    WAY_OUT,
    QuantSpec,
    StoredTensor,
    check_kind,
    fitting_variant,
    is_plain,
    is_split,
    match_variant,
    scheme_of,
)

_Tensors = Mapping[str, StoredTensor]

_MODELSLIM = frozenset({"weight_offset", "quant_bias", "deq_scale"})
_BLOCKS = {
    "F8_E4M3": '"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], …}',
    "I8": '"quantization_config": {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}',
}


def contradiction(module: str, found: _Tensors, said: Sequence[QuantSpec], quantized: bool = False) -> SchemeError:
    """For a linear whose tensors do not fit the first of what is said of it.

    quantized: whether anything in the checkpoint is, so that what says so must stay.
    """
    first = said[0]
    right = next((other for other in said[1:] if _is(other, found) and _word(other) != _word(first)), None)
    if right is not None:
        return _other_is_right(module, found, first, right)
    if is_plain(found) and first.kind != FLOAT:
        return SchemeError(
            f"{module}: {first.said_by} says {_word(first)}, and {module}.weight in {found['weight'].file} is plain "
            f"{found['weight'].dtype} with no scales{_mend_of_plain(first, quantized)}; or say --scheme bf16"
        )
    if first.kind == NO_BLOCK_SIZE and (variants := variants_of(found)):
        in_blocks = any(rule.in_blocks for rule in variants[0].tensors)
        mend = f"give its weight_block_size in {_file(first)}{_told(found)}" if in_blocks else _told(found, "")
        return SchemeError(
            f"{module}: {first.said_by} says {first.kind}, and its tensors ({tensors_text(found)}) are "
            f"{_are(found)}; {mend}"
        )
    if first.kind == FP8_PB_WO and variants_of(found):
        return SchemeError(
            f"{module}: {first.said_by} says {first.kind}, and its tensors ({tensors_text(found)}) are {_are(found)}; "
            f"vLLM computes the two alike: {_told(found, '')}, unless the engine leaves activations as they are"
        )
    if first.kind != FLOAT and (
        not is_split(first.kind) or _only_shapes_differ(first, found) or _only_lacks(first, found)
    ):
        return _caught(module, first, found)
    if _MODELSLIM & found.keys() and not is_description(_file(first)):
        return SchemeError(
            f"{module}: {first.said_by} says {_word(first)}, and its tensors ({tensors_text(found)}) are ModelSlim's, "
            f"whose {DESCRIPTION} is missing: put it beside the files{_told(found)}"
        )
    names = names_of_formats(found)
    if names and names[0] not in SCHEMES:
        return SchemeError(
            f"{module}: {first.said_by} says {_word(first)}, and its tensors ({tensors_text(found)}) are "
            f"{_are(found)}, which this version does not split; {WAY_OUT}"
        )
    if names and _word(first) not in names:
        return SchemeError(
            f"{module}: {first.said_by} says {_word(first)}, and its tensors ({tensors_text(found)}) are "
            f"{_are(found)}; {_stale(first)}{_told(found)}"
        )
    return _caught(module, first, found)


def two_fit(module: str, found: _Tensors, one: QuantSpec, other: QuantSpec) -> SchemeError:
    """For a linear of which two things are said, and whose tensors fit both."""
    first, second = words(one, other)
    option = f"; or say --scheme {first} or {second}" if _word(one) != _word(other) else ""
    return SchemeError(
        f"{module}: {one.said_by} says {first}, {other.said_by} says {second}, and its tensors "
        f"({tensors_text(found)}) fit both: make the two say what the weights are{option}"
    )


def words(one: QuantSpec, other: QuantSpec) -> tuple[str, str]:
    """What two accounts say of a linear, in words that differ where they do."""
    if _word(one) == _word(other):
        return _in_blocks(one), _in_blocks(other)
    return _word(one), _word(other)


def no_account(module: str, found: _Tensors, has_config: bool) -> SchemeError:
    """For a quantized linear of which nothing is said, and whose tensors do not tell."""
    missing = f"no quantization_config in {CONFIG}" if has_config else f"no {CONFIG}"
    text = f"{module}: its tensors ({tensors_text(found)}) are quantized, and there is {missing}"
    variants, names = variants_of(found), names_of_formats(found)
    if _MODELSLIM & found.keys():
        return SchemeError(
            f"{text} and no {DESCRIPTION}, which ModelSlim writes and vllm-ascend needs: put it beside the files"
            f"{_told(found)}"
        )
    if variants and any(rule.in_blocks for rule in variants[0].tensors):
        key = _BLOCKS[found["weight"].dtype]
        back = f"put it back: {key}" if has_config else f"put the model's own beside the files, with {key}"
        return SchemeError(
            f"{text}, which says the size of the blocks that a scale stands for; {back}{_told(found)}, for blocks of "
            "128 x 128"
        )
    if names and names[0] not in SCHEMES:
        return SchemeError(f"{text}; they are {_are(found)}, which this version does not split; {WAY_OUT}")
    fit = f"fit {' and '.join(names)}" if names else "are of no format that is known"
    return SchemeError(f"{text}; they {fit}: put the model's own beside the files{_told(found)}")


def unsaid(module: str, file: str, found: _Tensors) -> SchemeError:
    """For a linear that the account that is read first does not speak of."""
    if is_description(file):
        return SchemeError(
            f"{module}.weight: {file} does not name it, and engines look it up there; is the file of this checkpoint? "
            f"give the one that was written with these weights{_told(found)}"
        )
    option = _told(found, "")
    return SchemeError(
        f"{module}: {file} says MIXED_PRECISION, and not what this layer is; its tensors ({tensors_text(found)}) are "
        f"{_are(found)}{f': {option}' if option else f'; {WAY_OUT}'}"
    )


def not_told(module: str, scheme: str, found: _Tensors) -> SchemeError:
    """For a linear that is not what --scheme says."""
    fitting = dict.fromkeys(variant.scheme for variant in variants_of(found))
    mend = f"they fit {' and '.join(fitting)}" if fitting else WAY_OUT
    return SchemeError(f"{module}: --scheme {scheme}: its tensors ({tensors_text(found)}) are not {scheme}'s; {mend}")


def _other_is_right(module: str, found: _Tensors, first: QuantSpec, right: QuantSpec) -> SchemeError:
    mend = (
        f"{_stale(first, right)}, or say --scheme {_word(right)}"
        if is_split(right.kind)
        else f"{right.kind} is not split by this version; {WAY_OUT}"
    )
    return SchemeError(
        f"{module}: {first.said_by} says {_word(first)}, {right.said_by} says {_word(right)}, and its tensors "
        f"({tensors_text(found)}) are {_are(found)}, as {right.said_by} says; {mend}"
    )


def _caught(module: str, declared: QuantSpec, found: _Tensors) -> SchemeError:
    """The line that the split table has for it."""
    try:
        check_kind(module, declared, types_text(found))
        match_variant(module, declared, found)
    except SchemeError as error:
        return error
    raise AssertionError(f"{module}: {declared} fits")


def _is(declared: QuantSpec, found: _Tensors) -> bool:
    """Whether what is said is what the tensors are; of what is not split, by name."""
    return fitting_variant(declared, found) is not None or any(n in declared.kind for n in names_of_formats(found))


def _only_lacks(declared: QuantSpec, found: _Tensors) -> bool:
    """Whether a weight of the kind's type is there alone: the rest is missing."""
    variants = [variant for variant in VARIANTS if variant.kind == declared.kind and len(variant.tensors) > 1]
    weights = {
        dtype for variant in variants for rule in variant.tensors if rule.suffix == "weight" for dtype in rule.dtypes
    }
    return found.keys() == {"weight"} and found["weight"].dtype in weights


def _only_shapes_differ(declared: QuantSpec, found: _Tensors) -> bool:
    """Whether the tensors are the kind's by suffix and type."""
    return any(
        variant.kind == declared.kind
        and variant.suffixes == found.keys()
        and all(found[rule.suffix].dtype in rule.dtypes for rule in variant.tensors)
        for variant in VARIANTS
    )


def _are(found: _Tensors) -> str:
    return " or ".join(names_of_formats(found)) or "of no format that is known"


def _word(declared: QuantSpec) -> str:
    return scheme_of(declared.kind)


def _file(declared: QuantSpec) -> str:
    return declared.said_by.partition(" ")[0]


def _in_blocks(declared: QuantSpec) -> str:
    sizes = declared.block
    return f"{_word(declared)} in blocks of {sizes[0]} x {sizes[1]}" if sizes else _word(declared)


def _stale(declared: QuantSpec, right: QuantSpec | None = None) -> str:
    if right is not None and _file(right) == _file(declared):
        return f"make both places in {_file(declared)} say that"
    return f"{_file(declared)} is not of these weights: give the one that was written with them"


def _mend_of_plain(declared: QuantSpec, quantized: bool) -> str:
    """Only where nothing is quantized, the whole checkpoint was cast; elsewhere what says so is needed."""
    file = _file(declared)
    if quantized:
        where = "in its list of exceptions" if file == CONFIG else f"FLOAT in {file}"
        return f", while other tensors of the checkpoint are quantized: name the dense layers {where}"
    cast = f": weights that were cast, beside the {file} of the original (nothing else here is quantized)?"
    if file == CONFIG:
        return f"{cast} remove quantization_config from {CONFIG}"
    return f"{cast} move {file} to another folder, or give the one that was written with these weights"


def _told(found: _Tensors, before: str = ", or ") -> str:
    """How --scheme would help: the schemes that the tensors fit."""
    schemes = dict.fromkeys(variant.scheme for variant in variants_of(found))
    return f"{before}say --scheme {' or '.join(schemes)}" if schemes else ""
