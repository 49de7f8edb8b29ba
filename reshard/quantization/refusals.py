"""Why a linear is not cut: what is said of it, what its tensors are, and what would mend it."""

import json
from collections.abc import Sequence

from reshard.errors import SchemeError
from reshard.model.naming import CONFIG, MANIFEST
from reshard.quantization.description import DESCRIPTION, is_description
from reshard.quantization.formats import names_of_formats, needs_block, tensors_text, variants_of
from reshard.quantization.methods import FP8_PB_WO, NO_BLOCK_SIZE
from reshard.schemes.declare import quantization_config
from reshard.schemes.match import QuantSpec, Stored, fitting_variant, is_plain, is_split, scheme_of
from reshard.schemes.table import FLOAT, SCHEMES, VARIANTS, WAY_OUT

_MODELSLIM = frozenset({"weight_offset", "quant_bias", "deq_scale"})
OPTION = "--scheme"
_MENDS = {OPTION: "leave --scheme out", MANIFEST: "copy the set again"}
_NOT_SPLIT = f"this version does not split it; {WAY_OUT}"


def contradiction(module: str, found: Stored, said: Sequence[QuantSpec], quantized: bool = False) -> SchemeError | None:
    """For a linear whose tensors do not fit the first of what is said of it.

    quantized: whether anything in the checkpoint is, so that what says so must stay. None: the table of schemes has a
    line for it, on a kind that is not split, or a tensor that is missing or misshapen.
    """
    first, file = said[0], _file(said[0])
    scheme, option, fits, formats = scheme_of(first.kind), _option(found), variants_of(found), names_of_formats(found)
    right = next((other for other in said[1:] if _is(other, found) and scheme_of(other.kind) != scheme), None)
    stale = _MENDS.get(file, f"{file} is not of these weights: give the one that was written with them")
    if file == MANIFEST:
        return _error(module, found, (first,), "", stale)
    if right is not None:
        same = f"make both places in {file} say that" if _file(right) == file else stale
        ways = (same, option) if is_split(right.kind) else (_NOT_SPLIT, "")
        return _error(module, found, (first, right), f", as {right.said_by} says", *ways)
    if is_plain(found) and first.kind == FLOAT:
        return None
    if is_plain(found):
        note = f" with no scales ({module}.weight in {found['weight'].file})"
        return _error(module, found, (first,), note, _mend_of_plain(file, quantized), option)
    if fits and first.kind == FP8_PB_WO:
        unless = f"{option}, unless the engine leaves activations as they are"
        return _error(module, found, (first,), ": vLLM computes the two alike", unless)
    if fits and first.kind in NO_BLOCK_SIZE and scheme not in formats:
        give = f"give its weight_block_size in {file}" if needs_block(fits[0].kind) and file == CONFIG else ""
        return _error(module, found, (first,), "", give, option)
    if first.kind != FLOAT and (not is_split(first.kind) or _is_damaged(first, found)):
        return None
    if _MODELSLIM & found.keys() and not is_description(file):
        note = f", and ModelSlim's, whose {DESCRIPTION} is missing"
        return _error(module, found, (first,), note, "put it beside the files", option)
    if formats and formats[0] not in SCHEMES:
        return _error(module, found, (first,), "", _NOT_SPLIT)
    return _error(module, found, (first,), "", stale, option) if formats and scheme not in formats else None


def two_fit(module: str, found: Stored, one: QuantSpec, other: QuantSpec) -> SchemeError:
    """For a linear of which two things are said, and whose tensors fit both."""
    ways: tuple[str, ...] = ("make the two say what the weights are",)
    if scheme_of(one.kind) != scheme_of(other.kind):
        by_option = (_MENDS[OPTION], f"mend {_file(other)}")
        ways = by_option if one.said_by == OPTION else (*ways, _option(found))
    ways = (_MENDS[MANIFEST],) if one.said_by == MANIFEST else ways
    return _error(module, found, (one, other), ": they fit both", *ways)


def words(one: QuantSpec, other: QuantSpec) -> tuple[str, str]:
    """What two accounts say of a linear, in words that differ where they do."""
    first, second = scheme_of(one.kind), scheme_of(other.kind)
    return (_in_blocks(one), _in_blocks(other)) if first == second else (first, second)


def no_account(module: str, found: Stored, *, has_config: bool) -> SchemeError:
    """For a quantized linear of which nothing is said, and whose tensors do not tell."""
    missing = f"no quantization_config in {CONFIG}" if has_config else f"no {CONFIG}"
    fits, formats, way = variants_of(found), names_of_formats(found), f"put the model's own {CONFIG} beside the files"
    if _MODELSLIM & found.keys():
        missing += f" and no {DESCRIPTION}"
        way = "put the latter, which ModelSlim writes and vllm-ascend needs, beside the files"
    elif fits and needs_block(fits[0].kind):
        missing += ", which says the size of the blocks that a scale stands for"
        key = f'"quantization_config": {json.dumps(quantization_config(fits[0], ["Linear"], []))}'
        way = f"put back {key}" if has_config else f"{way}, with {key}"
    elif formats and formats[0] not in SCHEMES:
        way = _NOT_SPLIT
    return _error(module, found, (), "", way, _option(found), says=f"there is {missing}")


def unsaid(module: str, file: str, found: Stored) -> SchemeError:
    """For a linear that the account that is read first does not speak of."""
    option = _option(found)
    if is_description(file):
        says, stale = f"{file} does not name it, and engines look it up there", "give the one of these weights"
        return _error(f"{module}.weight", found, (), "", stale, option, says=says)
    says = f"{file} says MIXED_PRECISION, and not what this layer is"
    return _error(module, found, (), "", option or WAY_OUT, says=says)


def _error(module: str, found: Stored, said: Sequence[QuantSpec], note: str, *ways: str, says: str = "") -> SchemeError:
    """note: more on what the tensors are. ways: out of it, empty ones apart. says: where nothing is said, what is."""
    texts = words(*said) if len(said) == 2 else [scheme_of(spec.kind) for spec in said]
    says = says or ", ".join(f"{spec.said_by} says {text}" for spec, text in zip(said, texts, strict=True))
    are = " or ".join(names_of_formats(found)) or "of no format that is known"
    return SchemeError(
        f"{module}: {says}, and its tensors ({tensors_text(found)}) are {are}{note}; {', or '.join(filter(None, ways))}"
    )


def _option(found: Stored) -> str:
    """How --scheme would help: the schemes that the tensors fit; empty where there is none."""
    fits = variants_of(found)
    blocks = ", for blocks of 128 x 128" if fits and needs_block(fits[0].kind) else ""
    schemes = dict.fromkeys(variant.scheme for variant in fits)
    return f"say --scheme {' or '.join(schemes)}{blocks}" if schemes else ""


def _is(spec: QuantSpec, found: Stored) -> bool:
    """Whether what is said is what the tensors are; of what is not split, by name."""
    return fitting_variant(spec, found) is not None or any(name in spec.kind for name in names_of_formats(found))


def _is_damaged(spec: QuantSpec, found: Stored) -> bool:
    """Whether the tensors have the kind's types, and only shapes differ, or all but the weight is missing."""
    return any(
        all(found[rule.suffix].dtype in rule.dtypes for rule in variant.tensors if rule.suffix in found)
        and set(found) in (set(variant.suffixes), {"weight"})
        for variant in VARIANTS
        if variant.kind == spec.kind
    )


def _file(spec: QuantSpec) -> str:
    return spec.said_by.partition(" ")[0]


def _in_blocks(spec: QuantSpec) -> str:
    scheme = scheme_of(spec.kind)
    return f"{scheme} in blocks of {spec.block[0]} x {spec.block[1]}" if spec.block else scheme


def _mend_of_plain(file: str, quantized: bool) -> str:
    """Only where nothing is quantized, the whole checkpoint was cast; elsewhere what says so is needed."""
    if quantized:
        where = "in its list of exceptions" if file == CONFIG else f"FLOAT in {file}"
        return f"other tensors of the checkpoint are quantized: name the dense layers {where}"
    where = f"remove quantization_config from {CONFIG}" if file == CONFIG else f"move {file} to another folder"
    return f"weights that were cast, beside the {file} of the original (nothing else here is quantized)? {where}"
