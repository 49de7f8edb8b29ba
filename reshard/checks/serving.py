"""A serving setup: the option's rules, which the engine's hook says in the same words."""

from collections.abc import Callable, Iterator

from reshard.checks.ascend_option import taken_size
from reshard.checks.finding import Finding
from reshard.checks.report import KV_CONSUMERS, Serving
from reshard.checks.serving_option import OPTION, RULES, broken_rules, option_of
from reshard.checks.set_size import broken_size
from reshard.checks.setup import Broken, Setup
from reshard.manifest import Manifest
from reshard.model.parts import DENSE_FFN


def option_size(serving: Serving | None) -> int | None:
    """The group size that the option asks for, if it is one."""
    size = option_of(serving.additional_config) if serving else None
    return size if size is not None and size >= 1 else None


def check_part(
    serving: Serving, manifest: Manifest, moe: bool | None, can_be_cut: Callable[[int], bool], alone: bool
) -> Iterator[Finding]:
    """A set of another part than the DenseFFN, against the size that the engine cuts it for."""
    part, setup = manifest.what, setup_of(serving, moe)
    given = taken_size(serving.additional_config, part.option, setup)
    if part is DENSE_FFN or given is None:
        return
    if broken := broken_size(part, manifest.tp_size, serving.additional_config, setup, can_be_cut, alone=alone):
        yield _finding(broken)
    else:
        size = f"is {given}" if given else f"is not set, tensor-parallel size is {setup.tensor_parallel_size}"
        yield Finding("option", "", f"{part.option} {size}, as the shard set is cut", "ok")


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
    *,
    alone: bool = True,
) -> list[Finding]:
    """A finding for every rule that is broken, or one for all. moe: whether the model has MoE layers, if known.

    can_be_cut: whether the layers can be cut for a size, where there are layers to cut; no other size is advised.
    alone: no sets of other parts stand beside the shard set.
    """
    setup = setup_of(serving, moe)
    broken = broken_rules(serving.additional_config, setup, shards_tp_size, can_be_cut, alone=alone)
    if broken:
        return [_finding(rule) for rule in broken]
    size = serving.additional_config.get(OPTION)
    set_for = f", shard set cut for {shards_tp_size}" if shards_tp_size is not None else ""
    stages = f", pipeline-parallel size {setup.pipeline_parallel_size}" if setup.pipeline_parallel_size > 1 else ""
    sizes = f"data-parallel size {setup.data_parallel_size}, tensor-parallel size {setup.tensor_parallel_size}{stages}"
    what = f"{OPTION} {size}" if size is not None else f"no {OPTION}"
    return [Finding("option", "", f"{what}, {sizes}{set_for}: {len(RULES)} rules kept", "ok")]


def _finding(rule: Broken) -> Finding:
    return Finding(f"option-{rule.rule}", "", rule.message, "warning" if rule.warning else "error")
