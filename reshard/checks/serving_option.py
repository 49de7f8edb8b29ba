"""denseffn_tensor_parallel_size, the serving option: what it may be, said once for the engine's hook and for checks.

The option stands in the engine's additional config. Its value R counts ranks over data- and tensor-parallel together:
consecutive data-parallel ranks, each with all of its tensor-parallel ranks, share the layers, and a rank's place is its
data-parallel rank's place in that chunk times the tensor-parallel size, plus its tensor-parallel rank. R equal to the
tensor-parallel size is the engine's own partition. Absent, the DenseFFN is cut by plain tensor parallelism or not at
all. Each rule gives at most one line, with what was given and what is allowed; none advises what another forbids.
"""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from reshard.checks import ascend_option
from reshard.checks.ascend_option import FINEGRAINED, KEYS, MLP
from reshard.checks.set_size import another_size, cut_again
from reshard.checks.setup import Broken, Setup, either, is_integer
from reshard.model.parts import DENSE_FFN

OPTION = DENSE_FFN.option
_FAMILY = DENSE_FFN.key

RULES = {
    "name": "no other key of the additional config is nearly the option's",
    "place": "the option and vllm-ascend's sizes of its own stand where they are read",
    "twice": f"vllm-ascend's {MLP} does not cut the same layers",
    **ascend_option.RULES,
    "unset": "without a part's option, its shard set is cut for what the engine itself cuts that part for",
    "lockstep": "the model has MoE layers, so that its data-parallel ranks run in lockstep",
    "size": "the option is the tensor-parallel size times a divisor of the data-parallel size",
    "shards": "a part's option is its shard set's size",
}
"""Every rule, in the order in which they are judged. unset is silent after place, ascend and stages; from lockstep on,
only the first that is broken speaks: the others are about a value that may not stay, or that may be left out."""


def option_of(additional_config: Mapping[str, Any]) -> int | None:
    """The option's value if it is an integer; what else it may be, `broken_rules` says."""
    value = additional_config.get(OPTION)
    return value if is_integer(value) else None


def broken_rules(
    additional_config: Mapping[str, Any],
    setup: Setup,
    shards_tp_size: int | None = None,
    can_be_cut: Callable[[int], bool] = lambda size: True,
    *,
    alone: bool = True,
) -> tuple[Broken, ...]:
    """What is wrong with the option in a setup, in the order of the rules; nothing if it is absent or right.

    `shards_tp_size`: the shard set's, where one is given. `can_be_cut`: whether the model's layers can be cut for a
    size, where that is known; no other size is advised. alone: no sets of other parts stand beside it.
    """
    value = additional_config.get(OPTION)
    ascends = ascend_option.size_of(additional_config, MLP)
    found = [
        *_names(additional_config),
        *_places(additional_config),
        *_twice(value, ascends),
        *ascend_option.broken_rules(additional_config, setup),
    ]
    if value is not None:
        return (*found, *_value(value, setup, shards_tp_size, can_be_cut))
    if not any(broken.rule in ("place", "ascend", "stages") for broken in found):
        found += _unset(ascends, setup, shards_tp_size, can_be_cut, alone)
    return tuple(found)


def _value(
    value: object, setup: Setup, shards_tp_size: int | None, can_be_cut: Callable[[int], bool]
) -> tuple[Broken, ...]:
    """The rules about the option's own value, of which the first that is broken speaks."""
    sizes, tensor_parallel = setup.sizes, setup.tensor_parallel_size
    if setup.moe is False and is_integer(value) and value > tensor_parallel:
        way = "use tensor parallelism for it"
        if tensor_parallel > 1:
            way = "leave it out: the model's tensor-parallel ranks share the layers without it"
        message = (
            f"{OPTION} is {value}, and the model has no MoE layers: its data-parallel ranks run independently, and "
            f"a rank would wait for others that do not come; {way}"
        )
        return (Broken("lockstep", message),)
    if not is_integer(value) or value not in sizes:
        return (Broken("size", f"{OPTION} is {value!r}; {_may_be(setup, can_be_cut)}"),)
    if shards_tp_size in (None, value):
        return ()
    ways = [f"set it to {shards_tp_size}"] if shards_tp_size in sizes else []
    cut = cut_again(DENSE_FFN, value) if can_be_cut(value) else _may_be(setup, can_be_cut)
    message = f"{OPTION} is {value}, the shard set is cut for {shards_tp_size}: {', or '.join((*ways, cut))}"
    return (Broken("shards", message),)


def _may_be(setup: Setup, can_be_cut: Callable[[int], bool]) -> str:
    """What the option may be, and what would be allowed if only the layers could be cut for it."""
    # An engine tells the ranks of a model without MoE layers that their data-parallel size is 1: nothing is said of
    # that.
    given = ["no MoE layers" if setup.moe is False else f"data-parallel size {setup.data_parallel_size}"]
    if setup.tensor_parallel_size > 1:
        given.append(f"tensor-parallel size {setup.tensor_parallel_size}")
    fit = [size for size in setup.sizes if can_be_cut(size)]
    others = [size for size in setup.sizes if size not in fit]
    if not fit:
        return f"with {' and '.join(given)} it would have to be {either(others)}, which the layers cannot be cut for"
    but = f" (not {either(others)}, which the layers cannot be cut for)" if others else ""
    return f"with {' and '.join(given)} it may be {either(fit)}{but}"


def _unset(
    ascends: Any, setup: Setup, shards_tp_size: int | None, can_be_cut: Callable[[int], bool], alone: bool
) -> tuple[Broken, ...]:
    """Without the option, the engine cuts by its tensor-parallel size, or by vllm-ascend's for these layers."""
    size = ascends or setup.tensor_parallel_size
    if shards_tp_size is None or shards_tp_size == size:
        return ()
    may_be_set = not ascends and shards_tp_size in setup.sizes
    broken = another_size(
        DENSE_FFN,
        shards_tp_size,
        size,
        to_use_it=[f"set it to {shards_tp_size}"] if may_be_set else [],
        others=[cut_again(DENSE_FFN, size)] if can_be_cut(size) else [],
        given=f"{OPTION} is not set, ",
        alone=alone,
    )
    return (broken,)


def _names(additional_config: Mapping[str, Any]) -> list[Broken]:
    """Other keys of the family, or nearly the option's: the config is shared, so a misspelt one would go unnoticed."""
    return [
        Broken("name", f"{key} in the additional config is no option; {OPTION} is")
        for key in additional_config
        if key != OPTION and (str(key).startswith(_FAMILY) or get_close_matches(str(key), [OPTION], cutoff=0.85))
    ]


def _places(additional_config: Mapping[str, Any]) -> list[Broken]:
    """A key where nothing reads it, vllm-ascend's old place for such keys among them: its top (0.11)."""
    wrong = []
    for path in _paths(additional_config):
        *above, key = path
        if key == OPTION and above:
            at = ".".join(above)
            wrong.append(
                f"{OPTION} stands in {at}, where nothing reads it; it belongs at the top of the additional config"
            )
        elif key in KEYS and above != [FINEGRAINED] and not any(map(_nearly_finegrained, above)):
            at = f"in {'.'.join(above)}" if above else "at the top of the additional config"
            wrong.append(f"{key} stands {at}, where nothing reads it; it belongs in {FINEGRAINED}")
        elif above == [FINEGRAINED] and key not in KEYS and (near := get_close_matches(key, KEYS, cutoff=0.92)):
            wrong.append(f"{key} is no key of {FINEGRAINED}; {near[0]} is")
        elif not above and _nearly_finegrained(key):
            wrong.append(f"{key} is no key of vllm-ascend's; {FINEGRAINED} is")
    return [Broken("place", "; ".join(wrong))] if wrong else []


def _nearly_finegrained(key: str) -> bool:
    return key != FINEGRAINED and bool(get_close_matches(key, [FINEGRAINED], cutoff=0.85))


def _paths(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key with those above it."""
    for key, value in config.items():
        path = (*above, str(key))
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, path)


def _twice(value: object, ascends: Any) -> tuple[Broken, ...]:
    if value is None or ascends == 0:
        return ()
    message = (
        f"{OPTION} is {value!r} and {FINEGRAINED}.{MLP} {ascends!r}: both cut the same layers; leave one of the two out"
    )
    return (Broken("twice", message),)
