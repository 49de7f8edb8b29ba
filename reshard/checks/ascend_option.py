"""vllm-ascend's own sizes of fine-grained tensor parallelism, and its rules for them.

It says them with an assertion, 0.18 the fewest, or not at all. They hold for 0.18, 0.23 and its main branch of August
2026 (FinegrainedTPConfig in its ascend_config.py, init_ascend_model_parallel in its distributed/parallel_state.py). Its
groups are made as if ranks were laid out by stage, data-parallel and tensor-parallel rank; they are by data-parallel
rank, stage and tensor-parallel rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.checks.setup import Broken, Setup, divisors, either, is_integer
from reshard.model.parts import DENSE_FFN, EMBEDDING, LM_HEAD, O_PROJ

FINEGRAINED, MLP = "finegrained_tp_config", "mlp_tensor_parallel_size"
KEYS = (MLP, LM_HEAD.option, EMBEDDING.option, O_PROJ.option)
"""The DenseFFN's stands beside this project's option, which cuts the same layers."""

_WITHIN_A_STAGE = {MLP: f" ({DENSE_FFN.option} splits within a stage)"}


@dataclass(frozen=True)
class _Rule:
    """what: of a right setup. beside, why: of one that breaks it, after the key and its size."""

    name: str
    what: str
    keys: tuple[str, ...]
    breaks: Callable[[int, Setup, Mapping[str, Any]], bool]
    beside: str
    why: str
    warning: bool = False


_RULES = (
    _Rule(
        "stages",
        "none of them stands beside pipeline parallelism, whose stages vllm-ascend's groups mix",
        KEYS,
        lambda size, setup, config: size > 1 and setup.pipeline_parallel_size > 1,
        "pipeline-parallel size {setup.pipeline_parallel_size}",
        "vllm-ascend's groups for it mix ranks of different stages; leave it out{stage}",
    ),
    _Rule(
        "heads",
        f"{O_PROJ.option} stands at tensor-parallel size 1, where a rank has all heads",
        (O_PROJ.option,),
        lambda size, setup, config: setup.tensor_parallel_size > 1,
        "tensor-parallel size {setup.tensor_parallel_size}",
        "vllm-ascend takes it at tensor-parallel size 1 only; leave one of the two out",
    ),
    _Rule(
        "graph",
        f"{O_PROJ.option} stands in graph mode, without enforce_eager",
        (O_PROJ.option,),
        lambda size, setup, config: setup.enforce_eager is True,
        "with enforce_eager",
        "vllm-ascend takes it in graph mode only; leave one of the two out",
    ),
    _Rule(
        "decode",
        f"{O_PROJ.option} stands in a decode node, which consumes the KV caches of others",
        (O_PROJ.option,),
        lambda size, setup, config: setup.decode_node is False,
        "in a node that is no KV consumer",
        "vllm-ascend takes it in decode nodes only, with kv_role kv_consumer or kv_both; leave it out of others",
    ),
    _Rule(
        "recompute",
        f"{O_PROJ.option} and {EMBEDDING.option} stand beside recompute_scheduler_enable (vllm-ascend from 0.23 on)",
        (O_PROJ.option, EMBEDDING.option),
        lambda size, setup, config: setup.decode_node is not None and not _recomputes(config),
        "without recompute_scheduler_enable",
        "vllm-ascend from 0.23 on takes it with that only, in decode nodes; set it, or leave the size out",
        warning=True,
    ),
    _Rule(
        "sampling",
        f"{LM_HEAD.option} stands without enable_reduce_sample",
        (LM_HEAD.option,),
        lambda size, setup, config: bool(config.get("enable_reduce_sample")),
        "with enable_reduce_sample",
        "vllm-ascend takes one of them; leave the other out",
    ),
)

RULES = {
    "ascend": f"each of vllm-ascend's sizes in {FINEGRAINED} is one that it takes",
    **{rule.name: rule.what for rule in _RULES},
}


def size_of(additional_config: Mapping[str, Any], key: str) -> Any:
    """What a size is; 0, and all below it, is vllm-ascend's way to say that it is off."""
    nested = additional_config.get(FINEGRAINED)
    value = nested.get(key, 0) if isinstance(nested, Mapping) else 0
    return 0 if isinstance(value, int | float) and value <= 0 else value


def taken_size(additional_config: Mapping[str, Any], key: str, setup: Setup) -> int | None:
    """A size, 0 where it is off; None where vllm-ascend does not take it, as the rule `ascend` says."""
    size = size_of(additional_config, key)
    return size if is_integer(size) and (size == 0 or _not_taken(key, size, setup) is None) else None


def is_right(additional_config: Mapping[str, Any], key: str, size: int, setup: Setup) -> bool:
    """Whether this size alone, without the other parts' that are given, would break no rule."""
    return all(broken.warning for broken in broken_rules({**additional_config, FINEGRAINED: {key: size}}, setup))


def broken_rules(additional_config: Mapping[str, Any], setup: Setup) -> list[Broken]:
    """Every rule at most once, in their order. Of a size that vllm-ascend does not take, no other rule speaks."""
    sizes = {key: size for key in KEYS if (size := size_of(additional_config, key)) != 0}
    wrong = {key: message for key, size in sizes.items() if (message := _not_taken(key, size, setup))}
    found = [Broken("ascend", "; ".join(wrong.values()))] if wrong else []
    right = {key: size for key, size in sizes.items() if key not in wrong}
    for rule in _RULES:
        if said := "; ".join(_said(rule, right, additional_config, setup)):
            found.append(Broken(rule.name, said, rule.warning))
    return found


def _said(rule: _Rule, sizes: Mapping[str, int], additional_config: Mapping[str, Any], setup: Setup) -> Iterator[str]:
    for key in rule.keys:
        if key in sizes and rule.breaks(sizes[key], setup, additional_config):
            said = f"{rule.beside}: {rule.why}".format(setup=setup, stage=_WITHIN_A_STAGE.get(key, ""))
            yield f"{FINEGRAINED}.{key} is {sizes[key]}, {said}"


def _not_taken(key: str, size: Any, setup: Setup) -> str | None:
    if setup.moe is False:
        return (
            f"{FINEGRAINED}.{key} is {size!r}, and the model has no MoE layers: vllm-ascend takes it for models that "
            "have some; leave it out"
        )
    sizes = divisors(setup.data_parallel_size)
    if is_integer(size) and size in sizes:
        return None
    return (
        f"{FINEGRAINED}.{key} is {size!r}; with data-parallel size {setup.data_parallel_size} it may be {either(sizes)}"
    )


def _recomputes(config: Mapping[str, Any]) -> bool:
    """At the top, or where its main branch has it."""
    scheduler = config.get("scheduler_config")
    places = (config, scheduler if isinstance(scheduler, Mapping) else {})
    return any(place.get("recompute_scheduler_enable") for place in places)
