"""A linear's tensors, as files have them, against the table: which variant they are, or what speaks against it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reshard.errors import SchemeError, UsageError
from reshard.schemes.table import SCHEMES, VARIANTS, WAY_OUT, Shape, TensorRule, Variant, unknown_scheme
from reshard.tensors.dtypes import FLOATS


@dataclass(frozen=True)
class QuantSpec:
    """What a description or config says of one linear: a kind of `VARIANTS`, its scale block, who says it."""

    kind: str
    block: tuple[int, int] | None
    said_by: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


Stored = Mapping[str, StoredTensor]
"""A linear's tensors by suffix."""


def check_scheme(scheme: str) -> None:
    """Raises UsageError for a `--scheme` that is none of SCHEMES."""
    if scheme not in SCHEMES:
        raise UsageError(f"--scheme: {unknown_scheme(scheme)}")


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


def is_plain(found: Stored) -> bool:
    """Whether a linear is a float weight and nothing else."""
    return found.keys() == {"weight"} and found["weight"].dtype in FLOATS


def match_variant(module: str, declared: QuantSpec, found: Stored) -> Variant:
    """The variant of a known kind that a linear's tensors, by suffix, are.

    Raises SchemeError naming the tensor where one is unknown, missing, of another type, or of another shape than
    the weight's calls for.
    """
    variant = _closest(declared, found)
    for problem in _mismatches(module, variant, declared, found):
        raise SchemeError(problem)
    return variant


def fitting_variant(declared: QuantSpec, found: Stored) -> Variant | None:
    """The variant that a linear's tensors are, if what is declared of it fits them."""
    if not is_split(declared.kind):
        return None
    variant = _closest(declared, found)
    return None if any(_mismatches("", variant, declared, found)) else variant


def _closest(declared: QuantSpec, found: Stored) -> Variant:
    """The variant of the kind that fewest of the tensors speak against, the first of several."""

    def distance(variant: Variant) -> tuple[int, int]:
        rules = [rule for rule in variant.tensors if rule.suffix in found]
        others = sum(found[rule.suffix].dtype not in rule.dtypes for rule in rules)
        return len(variant.suffixes ^ found.keys()), others

    return min((variant for variant in VARIANTS if variant.kind == declared.kind), key=distance)


def _mismatches(module: str, variant: Variant, declared: QuantSpec, found: Stored) -> Iterator[str]:
    """What keeps a linear from being the variant; names first, then types, then shapes, which need all before them."""
    said_by, wrong = declared.said_by, False
    for suffix in sorted(found.keys() - variant.suffixes):
        yield (
            f"{module}.{suffix} in {found[suffix].file}: not a tensor of {variant.scheme} ({said_by}), which has "
            f"{', '.join(sorted(variant.suffixes))}"
        )
    for suffix in sorted(variant.suffixes - found.keys()):
        yield (
            f"{module}.{suffix}: missing; {said_by} makes the layer {variant.scheme}, and the checkpoint has only its "
            f"{', '.join(sorted(found))}; download the file that holds it again"
        )
        wrong = True
    if wrong:
        return
    for rule in variant.tensors:
        tensor = found[rule.suffix]
        if tensor.dtype not in rule.dtypes:
            yield (
                f"{module}.{rule.suffix} in {tensor.file}: is {tensor.dtype}, {said_by} makes it {variant.scheme}, "
                f"whose {rule.suffix} is {' or '.join(sorted(rule.dtypes))}; the two are not of one checkpoint"
            )
    weight = found["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        yield f"{module}.weight in {weight.file}: shape {list(weight.shape)}, expected a matrix [out, in]"
        return
    for rule in variant.tensors:
        yield from _misshapen(module, rule, variant.block or declared.block, found, said_by)


def _misshapen(
    module: str, rule: TensorRule, block: tuple[int, int] | None, found: Stored, said_by: str
) -> Iterator[str]:
    tensor, weight = found[rule.suffix], found["weight"].shape
    if rule.in_blocks and block is None:
        yield f"{module}.{rule.suffix}: {said_by} gives no block size for its scales"
        return
    allowed = rule.shape.sizes(weight, block)
    if tensor.shape in allowed:
        return
    expected = " or ".join(str(list(option)) for option in allowed)
    problem = f"{module}.{rule.suffix} in {tensor.file}: shape {list(tensor.shape)}"
    group = group_size(tensor.shape, weight) if rule.shape is Shape.CHANNEL else None
    if group is not None:
        yield (
            f"{problem}: scales by groups of {group} along in; {said_by} is split with one scale per row, {expected}; "
            "quantize per channel (group_size 0), or cut the BF16 or FP8 original"
        )
        return
    blocks = f" (blocks of {block[0]} x {block[1]})" if rule.in_blocks and block else ""
    yield (
        f"{problem}, with a weight of {list(weight)}{blocks} it must be {expected}, by {said_by}; the two are not of "
        "one checkpoint"
    )


def group_size(scales: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """How many elements along in share a scale, where a row has several: [out, in / group]."""
    if len(scales) != 2 or len(weight) != 2 or scales[0] != weight[0] or scales[1] < 2 or weight[1] % scales[1]:
        return None
    return weight[1] // scales[1]
