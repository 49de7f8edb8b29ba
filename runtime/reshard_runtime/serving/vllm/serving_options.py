"""The load format's own keys in the engine's `model_loader_extra_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from reshard.errors import UsageError
from reshard_runtime.ffn import REDUCE_DTYPES
from reshard_runtime.loader import Verify

_CHOICES: dict[str, dict[str | None, Any]] = {
    "reduce_dtype": {None: None, **{str(dtype).removeprefix("torch."): dtype for dtype in REDUCE_DTYPES}},
    "verify": {name: name for name in get_args(Verify)},
    "source": {name: name for name in ("same", "any")},
}
_ENGINES = {"enable_weights_track"}  # vLLM's own for its default loader


@dataclass(frozen=True)
class Options:
    """`shards`: the folder of a shard set, or of sets of several parts.

    reduce_dtype: the type in which partial sums travel; None leaves it to the runtime (`reshard_runtime.ffn.DenseFFN`).
    max_tokens: how many rows every rank sends where the engine does not exchange token counts; None leaves it to the
    engine's own bound. verify: "digest" hashes every tensor that is loaded. source: "same" requires the files that the
    set was cut from in the model's folder, "any" takes any model of the same sizes.
    """

    shards: Path
    reduce_dtype: torch.dtype | None = None
    max_tokens: int | None = None
    verify: Verify = "header"
    source: str = "same"


def parse(extra: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options, and the keys that are the engine's. Raises UsageError for an unknown key or value."""
    own = {field.name for field in fields(Options)}
    for key in extra:
        if key not in own | _ENGINES:
            raise UsageError(
                f"model_loader_extra_config has {key!r}; denseffn_shards takes {', '.join(sorted(own | _ENGINES))}"
            )
    shards, max_tokens = extra.get("shards"), extra.get("max_tokens")
    if not isinstance(shards, str) or not shards:
        raise _wrong("shards", shards, "it must be the folder that reshard split wrote")
    if "://" in shards:
        raise _wrong("shards", shards, "a set is served from a folder: copy it to every host")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise _wrong("max_tokens", max_tokens, "it must be a number of tokens, 1 or more")
    chosen = {key: _chosen(key, extra[key]) for key in _CHOICES if key in extra}
    engines = {key: value for key, value in extra.items() if key in _ENGINES}
    return Options(Path(shards), max_tokens=max_tokens, **chosen), engines


def _chosen(key: str, value: Any) -> Any:
    for name, chosen in _CHOICES[key].items():
        if value == name:
            return chosen
    raise _wrong(key, value, f"it may be {', '.join(repr(name) for name in _CHOICES[key] if name)}")


def _wrong(key: str, value: Any, way_out: str) -> UsageError:
    return UsageError(f"model_loader_extra_config: {key} is {value!r}; {way_out}")
