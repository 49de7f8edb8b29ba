"""The load format's own keys in the engine's `model_loader_extra_config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from reshard.errors import UsageError
from reshard_runtime.ffn import REDUCE_DTYPES
from reshard_runtime.loader import Verify

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in REDUCE_DTYPES}
_VERIFY: tuple[str, ...] = get_args(Verify)
_SOURCE = ("same", "any")
# vLLM's own for its default loader.
_ENGINES = {"enable_weights_track"}


@dataclass(frozen=True)
class Options:
    """`shards`: the shard set's folder.

    reduce_dtype: the type in which partial sums travel; None leaves it to the runtime (`reshard_runtime.ffn.DenseFFN`).
    max_tokens: how many rows every rank sends where the engine does not exchange token counts; None leaves it to the
    engine's own bound. verify: "digest" hashes every tensor that is loaded. source: "same" wants the files that the
    set was cut from in the model's folder, "any" takes any model of the same sizes.
    """

    shards: Path
    reduce_dtype: torch.dtype | None = None
    max_tokens: int | None = None
    verify: Verify = "header"
    source: str = "same"


def parse(extra: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options, and the keys that are the engine's. Raises UsageError for an unknown key or value."""
    own = {"shards", "reduce_dtype", "max_tokens", "verify", "source"}
    for key in extra:
        if key not in own | _ENGINES:
            raise UsageError(
                f"model_loader_extra_config has {key!r}; denseffn_shards takes {', '.join(sorted(own | _ENGINES))}"
            )
    shards = extra.get("shards")
    if not isinstance(shards, str) or not shards:
        raise UsageError(
            f"model_loader_extra_config: shards is {shards!r}; it must be the folder that reshard split wrote"
        )
    if "://" in shards:
        raise UsageError(
            f"model_loader_extra_config: shards is {shards!r}; a set is served from a folder: copy it to every host"
        )
    max_tokens = extra.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise UsageError(
            f"model_loader_extra_config: max_tokens is {max_tokens!r}; it must be a number of tokens, 1 or more"
        )
    reduce_dtype = _one_of("reduce_dtype", extra.get("reduce_dtype"), (None, *_DTYPES))
    return (
        Options(
            Path(shards),
            _DTYPES.get(reduce_dtype),
            max_tokens,
            _one_of("verify", extra.get("verify", "header"), _VERIFY),
            _one_of("source", extra.get("source", "same"), _SOURCE),
        ),
        {key: value for key, value in extra.items() if key in _ENGINES},
    )


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed if name is not None)
        raise UsageError(f"model_loader_extra_config: {key} is {value!r}; it may be {names}")
    return value
