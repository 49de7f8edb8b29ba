"""A serving setup: the option's rules, which the engine's hook says in the same words."""

from reshard.check.report import Serving
from reshard.finding import Finding
from reshard.option import OPTION, RULES, Setup, broken_rules, option_of


def option_size(serving: Serving | None) -> int | None:
    """The group size that the option asks for, if it is one."""
    size = option_of(serving.additional_config) if serving else None
    return size if size is not None and size >= 1 else None


def check_serving(serving: Serving, moe: bool | None, shards_tp_size: int | None) -> list[Finding]:
    """A finding for every rule that is broken, or one for all. moe: whether the model has expert layers, if known."""
    setup = Setup(serving.data_parallel_size, serving.tensor_parallel_size, moe)
    broken = broken_rules(serving.additional_config, setup, shards_tp_size)
    if broken:
        return [Finding(f"option-{rule.rule}", "", rule.message) for rule in broken]
    size = serving.additional_config.get(OPTION)
    set_for = f", shard set cut for {shards_tp_size}" if shards_tp_size is not None else ""
    sizes = f"data-parallel size {setup.data_parallel_size}, tensor-parallel size {setup.tensor_parallel_size}{set_for}"
    what = f"{OPTION} {size}" if size is not None else f"no {OPTION}"
    return [Finding("option", "", f"{what}, {sizes}: {len(RULES)} rules kept", "ok")]
