"""What is asked of vllm-ascend, where it is the engine's platform: how many tokens a decode step may have."""

from typing import Any

from reshard.checks.serving_option import OPTION
from reshard.errors import UsageError


def is_platform() -> bool:
    """Whether vllm-ascend is the engine's platform."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.startswith("vllm_ascend")


def exchanges_counts(config: Any) -> bool:
    """Whether each rank is told how many tokens the others have. Decode nodes need not: `config` (vLLM's) decides."""
    if not is_platform():
        return True
    from vllm_ascend.utils import should_skip_allreduce_across_dp_group

    return not should_skip_allreduce_across_dp_group(config)


def fixed_rows(config: Any, is_split: bool, max_tokens: int | None) -> int | None:
    """The rows that every rank sends where the engine does not exchange token counts: its own bound, or `max_tokens`.

    None where it does, or where no layer `is_split`. config: vLLM's. Raises UsageError for a max_tokens that would not
    be used, and for rows that a step of requests may exceed.
    """
    if not is_split or exchanges_counts(config):
        if max_tokens is None:
            return None
        raise UsageError(
            f"max_tokens is {max_tokens} in model_loader_extra_config, and no rows are fixed here; leave it out: it is "
            f"for {OPTION} in decode nodes of vllm-ascend, which do not exchange token counts"
        )
    bound, batched = most_tokens(config), config.scheduler_config.max_num_batched_tokens
    rows = bound if max_tokens is None else max_tokens
    if rows < bound:
        raise UsageError(
            f"max_tokens is {rows} in model_loader_extra_config, and a decode step may have {bound} tokens; set it to "
            f"{bound} or more, or lower max_num_seqs and the largest graph size"
        )
    if rows < batched and not _only_decodes():
        raise UsageError(
            f"every rank would send {rows} rows, and a step may have {batched} tokens (max_num_batched_tokens): "
            "vllm-ascend exchanges no token counts here for prefill either; set recompute_scheduler_enable, which "
            f"leaves prefill to other nodes, lower max_num_batched_tokens to {rows}, or set max_tokens in "
            f"model_loader_extra_config to {batched}"
        )
    return rows


def most_tokens(config: Any) -> int:
    """The most tokens that a rank may have in a decode step, by the engine's own bound; 0.18.0 does not tell its."""
    from vllm_ascend import ascend_forward_context, utils

    if hasattr(utils, "get_potential_max_tokens"):
        return int(utils.get_potential_max_tokens())
    scheduler, speculative = config.scheduler_config, config.speculative_config
    queries = 1 + (speculative.num_speculative_tokens if speculative else 0)
    requests = min(scheduler.max_num_batched_tokens, scheduler.max_num_seqs * queries)
    return int(max(ascend_forward_context.get_mc2_tokens_capacity(), requests))


def is_rehearsal() -> bool:
    """Whether the engine runs no requests but measures its memory or warms up: the same on every rank, of any size."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().attn_metadata is None


def _only_decodes() -> bool:
    """Whether requests that would have to be computed again go back to prefill nodes."""
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    name = "recompute_scheduler_enable"  # which is of its scheduler's config in later versions
    return bool(getattr(config, name, False) or getattr(getattr(config, "scheduler_config", None), name, False))
