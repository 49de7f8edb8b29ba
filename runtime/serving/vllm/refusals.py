"""What a serving setup may not have, told before a model is built."""

from typing import Any

from reshard.errors import UsageError
from reshard.option import OPTION, Setup, broken_rules

_ASCENDS = "finegrained_tp_config.mlp_tensor_parallel_size"


def refuse(config: Any, additional: dict[str, Any], moe: bool, shards_tp_size: int, device_type: str) -> None:
    """Raise UsageError for what the option, or a layer split over data-parallel ranks, does not go with.

    config: vLLM's VllmConfig. additional: its additional_config. device_type: the engine's platform's.
    """
    parallel = config.parallel_config
    setup = Setup(parallel.data_parallel_size, parallel.tensor_parallel_size, moe)
    messages = [rule.message for rule in broken_rules(additional, setup, shards_tp_size)]
    size = additional.get(OPTION)
    if size not in (None, 1):
        without = {
            "LoRA": config.lora_config is not None,
            "dual batch overlap (enable_dbo, ubatch_size)": parallel.use_ubatching,
            "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        }
        messages += [
            f"{OPTION} does not go with {name}; leave one of the two out" for name, on in without.items() if on
        ]
        transfer = config.kv_transfer_config
        if device_type == "npu" and transfer is not None and transfer.is_kv_consumer:
            # should_skip_allreduce_across_dp_group of vllm_ascend/utils.py: a rank's own count stands for all.
            messages.append(
                f"{OPTION} is {size}, and vllm-ascend need not exchange token counts in a decode node of a "
                f"disaggregated deployment; leave it out and set {_ASCENDS} to {size}: the shards fill those layers too"
            )
    if messages:
        raise UsageError("; ".join(messages))


def refuse_elastic(config: Any) -> None:
    """Raise UsageError where ranks may join later: theirs would load alone, and nothing may be exchanged before."""
    if config.parallel_config.enable_elastic_ep:
        raise UsageError(
            "denseffn_shards does not go with elastic expert parallelism (enable_elastic_ep); leave one of the two out"
        )


def refuse_unbuilt(additional: dict[str, Any], version: str) -> None:
    """Raise UsageError for the option, to an engine that builds models without asking the loader."""
    if additional.get(OPTION) not in (None, 1):
        raise UsageError(
            f"{OPTION} needs vLLM 0.32 or later, this is {version}; leave it out: with tensor parallelism, or "
            f"vllm-ascend's {_ASCENDS}, the shards fill the engine's own layers"
        )
