"""What is asked of vllm-ascend, where it is the engine's platform: how many tokens a decode step may have."""

from typing import Any

from reshard.errors import UsageError
from reshard.option import OPTION


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


def fixed_rows(config: Any, split: bool, max_tokens: int | None) -> int | None:
    """P for a model that is `split` where the engine does not exchange token counts: its own bound, or `max_tokens`.

    None where it does. config: vLLM's. Raises UsageError for a max_tokens that would not be used.
    """
    if split and not exchanges_counts(config):
        return most_tokens() if max_tokens is None else max_tokens
    if max_tokens is not None:
        raise UsageError(
            f"max_tokens is {max_tokens} in model_loader_extra_config, and no rows are fixed here; leave it out: it is "
            f"for {OPTION} in decode nodes of vllm-ascend, which do not exchange token counts"
        )
    return None


def most_tokens() -> int:
    """The most tokens that a rank may have in a decode step, by the engine's own bound.

    Where a version does not tell it (0.18.0), what its expert layers' exchange holds: a step without exchanged counts
    has to fit that, too.
    """
    from vllm_ascend import ascend_forward_context, utils

    bound = getattr(utils, "get_potential_max_tokens", None) or ascend_forward_context.get_mc2_tokens_capacity
    return int(bound())


def is_profiling() -> bool:
    """Whether the engine measures its memory: with as many tokens as a step may ever have, the same on every rank."""
    if not is_platform():
        return False
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX

    return bool(_EXTRA_CTX.in_profile_run)
