"""What is asked of the checks, and what they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reshard.finding import Finding, Severity

CHECKS = {
    "input": "what was given can be read",
    "layers": "the dense layers are found by their tensors' names, and are those that config.json makes dense",
    "shapes": "the weights have the shapes that config.json's sizes make",
    "scheme": "each linear has the tensors, types and shapes of its scheme; gate and up agree",
    "divides": "intermediate_size is divisible by the group's size",
    "blocks": "a rank's share is whole scale blocks",
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


@dataclass(frozen=True)
class Serving:
    """How an engine would be started: its additional config, and its sizes."""

    additional_config: Mapping[str, Any]
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class Request:
    """What to check beyond the input itself.

    tp_sizes: group sizes to cut for; of a shard set, those that it may be cut for. scheme: of a config.json alone.
    weights, pad: as `split` takes them. revision: of a hub repository that is checked. against: the address of what a
    shard set was cut from.
    """

    tp_sizes: tuple[int, ...] = ()
    scheme: str | None = None
    weights: str = "keep"
    pad: bool = False
    against: str | None = None
    device: Literal["cpu", "npu"] = "cpu"
    serving: Serving | None = None
    revision: str | None = None


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
        """Whether the target could not be read, so that nothing was checked."""
        return any(finding.check == "input" for finding in self.findings)

    def failed(self, strict: bool = False) -> bool:
        """Whether any check failed; strict counts warnings."""
        return bool(self.of("error") or (strict and self.of("warning")))


def not_checked(checks: tuple[str, ...], why: str) -> tuple[Finding, ...]:
    """A finding for each of the checks that could not be made."""
    return tuple(Finding(check, "", f"not checked: {why}", "skipped") for check in checks)
