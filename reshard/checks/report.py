"""What is asked of the checks, and what they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reshard.checks.finding import Finding, Severity
from reshard.convert import Weights
from reshard.errors import UsageError
from reshard.model.naming import MAX_TP_SIZE
from reshard.model.parts import DENSE_FFN, Part

CHECKS = {
    "input": "what was given can be read",
    "layers": "the dense layers, or another part, are found by their tensors' names, and are those of config.json",
    "shapes": "the weights have the shapes that config.json's sizes make",
    "scheme": "each linear has the tensors, types and shapes of its scheme; gate and up agree",
    "divides": f"{DENSE_FFN.size}, or another part's size, is divisible by the group's size",
    "blocks": "a rank's share is whole scale blocks",
    "parts": "every set that was cut together with those in a folder is there",
    "manifest": "the shard set has a manifest, of a known version, every field of it as its schema says",
    "ranks": "every file that the manifest names is there, in its size; no other shard is",
    "headers": "each shard's header has the tensors that the manifest names, and its own rank",
    "cut": "the shards' tensors are the ones, slice by slice, that cutting the set's own weights gives",
    "size": "the set is cut for a size that --tp names",
    "source": "the files that the set was cut from are those of --against, by name, size and header",
    "kernels": "the device has kernels for the scheme as it is stored",
    "tiles": "a rank's matrices are whole tiles of the device",
    "limits": "no matrix is wider than the device's kernels take",
    "forward": "torch_npu's own shape functions accept every call of the forward pass",
    "option": "denseffn_tensor_parallel_size fits the serving setup; option-… names the rule that is broken",
}
"""Every check, in the order in which they are reported."""

Kind = Literal["config", "checkpoint", "shard set"]
Device = Literal["cpu", "npu"]

KV_CONSUMERS = ("kv_consumer", "kv_both")
_KV_ROLES = ("kv_producer", *KV_CONSUMERS)  # vLLM's (config/kv_transfer.py)
_MAX_SIZE = 99_999  # of an engine's sizes: larger ones are a slip


@dataclass(frozen=True)
class Serving:
    """How an engine would be started: its additional config, and its options. Raises UsageError for what is none.

    kv_role: of the engine's kv-transfer-config, None without one.
    """

    additional_config: Mapping[str, Any]
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enforce_eager: bool = False
    kv_role: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.additional_config, Mapping):
            raise UsageError(f"additional config: expected a mapping of options, got {self.additional_config!r}")
        for name in ("data", "tensor", "pipeline"):
            size = getattr(self, f"{name}_parallel_size")
            if type(size) is not int or not 1 <= size <= _MAX_SIZE:
                raise UsageError(f"{name}-parallel size: expected a whole number from 1 to {_MAX_SIZE}, got {size!r}")
        if self.kv_role not in (None, *_KV_ROLES):
            raise UsageError(f"kv role {self.kv_role!r}: there are {', '.join(_KV_ROLES)}")
        if type(self.enforce_eager) is not bool:
            raise UsageError(f"enforce eager: expected true or false, got {self.enforce_eager!r}")


@dataclass(frozen=True)
class Request:
    """What to check beyond the input itself.

    tp_sizes: group sizes to cut for; of a shard set, those that it may be cut for. scheme: see describe and
    config_checkpoint. weights, pad: as `split` takes them. revision: of a hub repository that is checked. index: which
    account of a checkpoint's weights to take (reshard.source.choice). against: the address of what a shard set was cut
    from. alone: no sets of other parts are served with a shard set.

    Raises UsageError for values that are none of these.
    """

    tp_sizes: tuple[int, ...] = ()
    scheme: str | None = None
    weights: Weights = "keep"
    pad: bool = False
    against: str | None = None
    device: Device = "cpu"
    serving: Serving | None = None
    revision: str | None = None
    index: str | None = None
    part: Part | None = None
    alone: bool = True

    def __post_init__(self) -> None:
        for size in self.tp_sizes:
            if type(size) is not int or not 1 <= size <= MAX_TP_SIZE:
                raise UsageError(f"tp {size!r}: a group size is a whole number from 1 to {MAX_TP_SIZE}")
        for name, value, known in (("weights", self.weights, Weights), ("device", self.device, Device)):
            if value not in get_args(known):
                raise UsageError(f"{name} {value!r}: there are {', '.join(get_args(known))}")


@dataclass(frozen=True)
class Report:
    """What the checks found of one target. `file`: the target, where it is a file that an annotation can point at."""

    target: str
    kind: Kind | None
    findings: tuple[Finding, ...]
    file: str | None = None

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of a severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def unreadable(self) -> bool:
        """Whether the target, or what it was to be held against, could not be read."""
        return any(finding.check == "input" for finding in self.findings)

    def failed(self, strict: bool = False) -> bool:
        """Whether any check failed; strict counts warnings."""
        return bool(self.of("error") or (strict and self.of("warning")))


def not_checked(checks: tuple[str, ...], why: str) -> tuple[Finding, ...]:
    """A finding for each of the checks that could not be made."""
    return tuple(Finding(check, "", f"not checked: {why}", "skipped") for check in checks)
