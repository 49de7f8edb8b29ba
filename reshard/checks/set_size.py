"""Whether a set is cut for what an engine has its part for: said once, for checks and for the engine's hook.

A set that is not used saves neither memory nor reading, which is hardly meant: it is wrong. Beside sets of other parts
it may be meant, since one folder serves nodes with different options: a warning, where the engine has the part whole.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reshard.checks.ascend_option import is_right, taken_size
from reshard.checks.setup import Broken, Setup
from reshard.model.parts import DENSE_FFN, Part, Place


def another_size(
    part: Part,
    cut_for: int,
    size: int,
    *,
    to_use_it: Sequence[str],
    others: Sequence[str],
    given: str = "",
    alone: bool,
    rule: str = "unset",
) -> Broken:
    """Of a set that is cut for another size than the engine has its part for.

    to_use_it, others: ways out, by settings and without. given: what is said of the part's option, where that is known.
    alone: no set of another part stands beside it.
    """
    has = "dense layers are" if part.place is Place.DENSE_LAYERS else f"{part.name} is"
    said = f"{given}the shard set is cut for {cut_for}, the engine's {has} for {size}"
    if size == 1 and not alone:
        less = f"; for less memory and reading, {to_use_it[0]}" if to_use_it else ""
        return Broken(rule, f"{said}: the part is loaded whole, from the model{less}", warning=True)
    return Broken(rule, f"{said}: {', or '.join((*to_use_it, *others)) or 'which no set can be cut for'}")


def cut_again(part: Part, size: int) -> str:
    """A way out."""
    named = "" if part is DENSE_FFN else f"--part {part.key} "
    return f"cut it with reshard split {named}--tp {size}"


def broken_size(
    part: Part,
    cut_for: int,
    additional_config: Mapping[str, Any] | None,
    setup: Setup,
    can_be_cut: Callable[[int], bool],
    *,
    alone: bool,
) -> Broken | None:
    """Of a set of another part than the DenseFFN. Silent where vllm-ascend does not take its size for it.

    additional_config: None where the engine is another, which has no such sizes.
    """
    given = 0 if additional_config is None else taken_size(additional_config, part.option, setup)
    size = given or setup.tensor_parallel_size
    if given is None or size == cut_for:
        return None
    if additional_config is None:
        said, may_be_set = f"tensor-parallel size is {size}", True
    else:
        said = f"{part.option} is {given or 'not set'}"
        may_be_set = is_right(additional_config, part.option, cut_for, setup)
    return another_size(
        part,
        cut_for,
        size,
        to_use_it=[f"set it to {cut_for}"] if may_be_set else [],
        others=[cut_again(part, size) if size > 1 and can_be_cut(size) else "take the set away"],
        given=f"{said}, ",
        alone=alone,
        rule="shards" if given else "unset",
    )
