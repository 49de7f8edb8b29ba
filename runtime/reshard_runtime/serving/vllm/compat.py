"""What a serving setup may not have, told before a model is built."""

from typing import Any

from reshard.checks.serving_option import OPTION, broken_rules, option_of
from reshard.checks.setup import Setup
from reshard.errors import UsageError
from reshard.model.parts import DENSE_FFN


def refuse(
    config: Any, additional: dict[str, Any], moe: bool, shards_tp_size: int | None, *, alone: bool = True
) -> None:
    """Raise UsageError for what the option, or a layer split over data-parallel ranks, does not go with.

    config: vLLM's VllmConfig. additional: its additional_config. shards_tp_size: of the DenseFFN's set, None without
    one. alone: whether that is the only set; beside others it need not be used.
    """
    parallel = config.parallel_config
    setup = Setup(parallel.data_parallel_size, parallel.tensor_parallel_size, moe, parallel.pipeline_parallel_size)
    broken = broken_rules(additional, setup, shards_tp_size)
    messages = [rule.message for rule in broken if alone or rule.rule != "unset"]
    if shards_tp_size is None and split_size(additional, parallel.tensor_parallel_size) is not None:
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
