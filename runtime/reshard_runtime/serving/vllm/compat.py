"""What a serving setup may not have, told before a model is built."""

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.checks.ascend_option import size_of
from reshard.checks.serving_option import OPTION, broken_rules, option_of
from reshard.checks.set_size import broken_size
from reshard.checks.setup import Broken, Setup
from reshard.errors import UsageError
from reshard.model.parts import DENSE_FFN, O_PROJ, Part


def refuse(config: Any, additional: dict[str, Any], moe: bool, sizes: Mapping[Part, int], *, ascend: bool) -> None:
    """Raise UsageError for what the option, or a layer split over data-parallel ranks, does not go with.

    Also for a set that is cut for another size than the engine will have its part for. config: vLLM's VllmConfig.
    additional: its additional_config. sizes: of the set of each part. ascend: whether vllm-ascend is the platform.
    """
    parallel = config.parallel_config
    setup = Setup(parallel.data_parallel_size, parallel.tensor_parallel_size, moe, parallel.pipeline_parallel_size)
    broken = [
        *broken_rules(additional, setup, sizes.get(DENSE_FFN), alone=len(sizes) == 1),
        *_of_another_size(additional, setup, sizes, ascend),
    ]
    messages = [rule.message for rule in broken if not rule.warning]
    if DENSE_FFN not in sizes and split_size(additional, parallel.tensor_parallel_size) is not None:
        messages.append(
            f"{OPTION} is {additional[OPTION]}, and no set of the DenseFFN is there; cut one with reshard split --part "
            f"{DENSE_FFN.key}, or leave the option out"
        )
    if split_size(additional, parallel.tensor_parallel_size) is not None:
        xlite = additional.get("xlite_graph_config") or {}
        without = {
            "LoRA": config.lora_config is not None,
            "dual batch overlap (enable_dbo, ubatch_size)": parallel.use_ubatching,
            "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
            "sequence parallelism (pass_config.enable_sp)": parallel.tensor_parallel_size > 1
            and bool(getattr(config.compilation_config.pass_config, "enable_sp", False)),
            "vllm-ascend's xlite_graph_config, which runs the layers itself": bool(xlite.get("enabled")),
        }
        messages += [
            f"{OPTION} does not go with {name}; leave one of the two out" for name, on in without.items() if on
        ]
    if messages:
        raise UsageError("; ".join(messages))


def _of_another_size(
    additional: Mapping[str, Any], setup: Setup, sizes: Mapping[Part, int], ascend: bool
) -> Iterator[Broken]:
    """Of the parts beside the DenseFFN, where their options tell what the engine will have them for.

    Under tensor parallelism vllm-ascend has other ways for o_proj (FLASHCOMM2, DSA context parallelism): there only the
    layers that it has built tell.
    """
    for part, size in sizes.items():
        has_other_ways = ascend and part is O_PROJ and setup.tensor_parallel_size > 1
        if part is DENSE_FFN or (has_other_ways and size_of(additional, part.option) == 0):
            continue
        config = additional if ascend else None
        if broken := broken_size(part, size, config, setup, lambda size: True, alone=len(sizes) == 1):
            yield broken


def split_size(additional: dict[str, Any], tensor_parallel_size: int) -> int | None:
    """The option, where it asks for more than what the engine's own tensor parallelism cuts."""
    size = option_of(additional)
    return None if size == tensor_parallel_size else size


def refuse_elastic(config: Any) -> None:
    """Raise UsageError where ranks may join later: theirs would load alone, and nothing may be exchanged before."""
    if config.parallel_config.enable_elastic_ep:
        raise UsageError(
            "denseffn_shards does not go with elastic expert parallelism (enable_elastic_ep); leave one of the two out"
        )
