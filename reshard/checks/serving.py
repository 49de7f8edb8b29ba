"""A serving setup: the option's rules, which the engine's hook says in the same words."""

from collections.abc import Callable, Iterator

from reshard.checks.ascend_option import size_of
from reshard.checks.finding import Finding
from reshard.checks.report import KV_CONSUMERS, Serving
from reshard.checks.serving_option import OPTION, RULES, broken_rules, option_of
from reshard.checks.setup import Setup
from reshard.manifest import Manifest
from reshard.model.parts import DENSE_FFN


def option_size(serving: Serving | None) -> int | None:
    """The group size that the option asks for, if it is one."""
    size = option_of(serving.additional_config) if serving else None
    return size if size is not None and size >= 1 else None


def check_part(serving: Serving, manifest: Manifest) -> Iterator[Finding]:
    """A set of another part than the DenseFFN, against the size that the engine cuts it for."""
    part = manifest.what
    if part is DENSE_FFN:
        return
    size = size_of(serving.additional_config, part.option)
    given = f"{part.option} is {size}"
    if size == 0:
        size = serving.tensor_parallel_size
        given = f"{part.option} is not set, tensor-parallel size is {size}"
    if size == manifest.tp_size:
        yield Finding("option", "", f"{given}, as the shard set is cut", "ok")
    else:
        way = f"set it to {manifest.tp_size}, or cut the set with --part {part.key}={size}"
        yield Finding("option-shards", "", f"{given}, the shard set is cut for {manifest.tp_size}; {way}")


def setup_of(serving: Serving, moe: bool | None) -> Setup:
    """As the rules see it."""
    return Setup(
        serving.data_parallel_size,
        serving.tensor_parallel_size,
        moe,
        serving.pipeline_parallel_size,
        serving.enforce_eager,
        serving.kv_role in KV_CONSUMERS,
    )


def check_serving(
    serving: Serving,
    moe: bool | None,
    shards_tp_size: int | None,
    can_be_cut: Callable[[int], bool] = lambda size: True,
) -> list[Finding]:
    """A finding for every rule that is broken, or one for all. moe: whether the model has MoE layers, if known.

    can_be_cut: whether the layers can be cut for a size, where there are layers to cut; no other size is advised.
    """
    setup = setup_of(serving, moe)
    broken = broken_rules(serving.additional_config, setup, shards_tp_size, can_be_cut)
    if broken:
        return [
            Finding(f"option-{rule.rule}", "", rule.message, "warning" if rule.warning else "error") for rule in broken
        ]
    size = serving.additional_config.get(OPTION)
    set_for = f", shard set cut for {shards_tp_size}" if shards_tp_size is not None else ""
    stages = f", pipeline-parallel size {setup.pipeline_parallel_size}" if setup.pipeline_parallel_size > 1 else ""
    sizes = f"data-parallel size {setup.data_parallel_size}, tensor-parallel size {setup.tensor_parallel_size}{stages}"
    what = f"{OPTION} {size}" if size is not None else f"no {OPTION}"
    return [Finding("option", "", f"{what}, {sizes}{set_for}: {len(RULES)} rules kept", "ok")]
