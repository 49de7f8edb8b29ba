"""denseffn_tensor_parallel_size, the serving option: what it may be, said once for the engine's hook and for checks.

The option stands in the engine's additional config. Absent, the DenseFFN is cut by plain tensor parallelism or not at
all. Each rule gives at most one line, with what was given and what is allowed; none advises what another forbids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

OPTION = "denseffn_tensor_parallel_size"
# vllm-ascend's own way to the same end: it cuts the same layers over its own group.
_ASCEND = ("finegrained_tp_config", "mlp_tensor_parallel_size")
_FAMILY = "denseffn"

RULES = {
    "name": "no other key of the additional config is nearly the option's",
    "twice": "vllm-ascend's mlp_tensor_parallel_size does not cut the same layers",
    "unset": "without the option, the shard set is cut for what the engine itself cuts its dense layers for",
    "lockstep": "the model has expert layers, so that its data-parallel ranks run in lockstep",
    "size": "the option divides the data-parallel size",
    "alone": "the option stands at tensor-parallel size 1 only",
    "shards": "the option is the shard set's size",
}
"""Every rule, in the order in which they are judged. From lockstep on only the first that is broken speaks: the others
are about a value that may not stay, or that may be left out."""


@dataclass(frozen=True)
class Setup:
    """A serving setup. `moe`: whether the model has expert layers, None where it is not known."""

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    moe: bool | None = None
    pipeline_parallel_size: int = 1


@dataclass(frozen=True)
class Broken:
    """A rule that a setup breaks."""

    rule: str
    message: str


def option_of(additional_config: Mapping[str, Any]) -> int | None:
    """The option's value if it is an integer; what else it may be, `broken_rules` says."""
    value = additional_config.get(OPTION)
    return value if _is_integer(value) else None


def broken_rules(
    additional_config: Mapping[str, Any], setup: Setup, shards_tp_size: int | None = None
) -> tuple[Broken, ...]:
    """What is wrong with the option in a setup, in the order of the rules; nothing if it is absent or right.

    `shards_tp_size`: the shard set's, where one is given.
    """
    named = _names(additional_config)
    if additional_config.get(OPTION) is None:
        return (*named, *_unset(additional_config, setup, shards_tp_size))
    value = additional_config[OPTION]
    if setup.moe is False and value != 1:
        # An engine tells such a model's ranks that their data-parallel size is 1, so nothing is said of that.
        message = (
            f"{OPTION} is {value!r}, and the model has no expert layers: its data-parallel ranks run independently, "
            "and a rank would wait for others that do not come; use tensor parallelism for it"
        )
        return (*named, Broken("lockstep", message))
    sizes = _divisors(setup.data_parallel_size)
    allowed = _or(sizes)
    if value not in sizes or not _is_integer(value):
        message = f"{OPTION} is {value!r}; with data-parallel size {setup.data_parallel_size} it may be {allowed}"
        return (*named, Broken("size", message))
    if setup.tensor_parallel_size != 1:
        message = (
            f"{OPTION} is {value}, tensor-parallel size {setup.tensor_parallel_size}: it splits over data-parallel "
            "ranks, at tensor-parallel size 1 only; leave one of the two out"
        )
        return (*named, Broken("alone", message))
    if shards_tp_size in (None, value):
        return named
    way = f"set it to {shards_tp_size}, or " if shards_tp_size in sizes and setup.moe is not False else ""
    message = (
        f"{OPTION} is {value}, the shard set is cut for {shards_tp_size}: {way}cut it with reshard split --tp {value}"
    )
    return (*named, Broken("shards", message))


def _unset(additional_config: Mapping[str, Any], setup: Setup, shards_tp_size: int | None) -> tuple[Broken, ...]:
    """Without the option, the engine cuts by its tensor-parallel size, or by vllm-ascend's for these layers."""
    ascends = _ascends(additional_config)
    size = setup.tensor_parallel_size if ascends is None else ascends
    if shards_tp_size in (None, size) or not _is_integer(size):
        return ()
    may_be_set = (
        ascends is None
        and setup.moe is not False
        and setup.tensor_parallel_size == 1
        and shards_tp_size in _divisors(setup.data_parallel_size)
    )
    way = f"set it to {shards_tp_size}, or " if may_be_set else ""
    message = (
        f"{OPTION} is not set, the shard set is cut for {shards_tp_size}, the engine's dense layers are for {size}: "
        f"{way}cut it with reshard split --tp {size}"
    )
    return (Broken("unset", message),)


def _names(additional_config: Mapping[str, Any]) -> tuple[Broken, ...]:
    """Other keys of the family, or nearly the option's: the config is shared, so a misspelt one would go unnoticed."""
    found = [
        Broken("name", f"{key} in the additional config is no option; {OPTION} is")
        for key in additional_config
        if key != OPTION and (str(key).startswith(_FAMILY) or get_close_matches(str(key), [OPTION], cutoff=0.85))
    ]
    other = _ascends(additional_config)
    if other is not None and additional_config.get(OPTION) is not None:
        found.append(
            Broken(
                "twice",
                f"{OPTION} is {additional_config[OPTION]!r} and {'.'.join(_ASCEND)} {other!r}: both cut the same "
                "layers; leave one of the two out",
            )
        )
    return tuple(found)


def _ascends(additional_config: Mapping[str, Any]) -> Any:
    """The value of vllm-ascend's own option, if it is there; 0 is its way to say that it is not."""
    nested = additional_config.get(_ASCEND[0])
    return (nested.get(_ASCEND[1]) or None) if isinstance(nested, Mapping) else None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or(values: list[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
