"""What is damaged: small checkpoints of several schemes, each with its shard set, whole and unfinished."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fuzz import truth
from tests.support import part_models
from tests.support.builders import Raw, Spec, build
from tests.support.part_models import Model
from tests.support.running import reshard

TP = 2


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its set for TP ranks, and the same set with rank 1 missing and without its manifest.

    share: a rank's share of what is cut, padding and all; options: what the set was cut with.
    """

    name: str
    spec: Spec | Model
    layout: str = "fused"
    multiple: int = 1  # what a rank's share is padded to
    key: str = "denseffn"

    @property
    def part(self) -> tuple[str, ...]:
        """The option that says what is cut."""
        return () if self.key == "denseffn" else ("--part", self.key)

    @property
    def options(self) -> tuple[str, ...]:
        """How it is cut."""
        return ("--layout", self.layout, *self.pad, *self.part)

    @property
    def pad(self) -> tuple[str, ...]:
        """The option, where it needs it."""
        return ("--pad",) if self.multiple > 1 else ()


_SMALL: dict[str, Any] = {"hidden": 64, "intermediate": 128, "computable": True}
_BLOCKS: dict[str, Any] = {"hidden": 128, "intermediate": 512, "computable": True}
SUBJECTS = (
    Subject("bf16", Spec("bf16", **_SMALL)),
    Subject("bf16-alone", Spec("bf16", hidden=64, intermediate=128, computable=True, files=1, index=False)),
    Subject("dynamic", Spec("modelslim_dynamic", **_SMALL)),
    Subject("static", Spec("modelslim_static", **_SMALL)),
    Subject("static-apart", Spec("modelslim_v0_static", **_SMALL), layout="separate"),
    Subject("compressed", Spec("ct_dynamic", **_SMALL)),
    Subject("fp8", Spec("fp8_block", **_BLOCKS)),
    Subject("fp8-padded", Spec("fp8_block", hidden=128, intermediate=384, computable=True), multiple=128),
    Subject("fp8-tensor", Spec("ct_fp8_tensor", **_SMALL)),
    Subject("o_proj", Model("modelslim_v0_static", 64, 128, 16, computable=True), key="o_proj"),
    Subject("o_proj-fp8", Model("fp8_block", 128, 512, 16, computable=True), key="o_proj"),
    Subject("lm_head", Model(hidden=64, attention=64, vocabulary=100), key="lm_head"),
    Subject("embedding", Model(hidden=64, attention=64, vocabulary=128), key="embedding"),
)


@dataclass(frozen=True)
class Made:
    """A subject on the disk, and what its weights are."""

    subject: Subject
    source: Path
    whole: Path
    unfinished: Path
    other: Path  # a set of other weights in the same shapes
    dense: dict[str, Raw]  # the tensors of what is cut
    share: int


def make(folder: Path, subject: Subject) -> Made:
    """Build and cut a subject; the sets are proved right before anything is damaged."""
    source, whole, unfinished, other = (folder / name for name in ("source", "whole", "unfinished", "other"))
    tensors = _build(source, subject.spec)
    dense = {name: raw for name, raw in tensors.items() if truth.is_of(name, subject.key, layers=2)}
    _build(folder / "other-source", replace(subject.spec, seed=1))
    for origin, out, more in (
        (source, whole, ()),
        (folder / "other-source", other, ()),
        (source, unfinished, ("--ranks", "0")),
    ):
        done = reshard("split", origin, out, "--tp", TP, "--quiet", *subject.options, *more)
        assert done.code == 0, done.err
    share = truth.share_of(dense, TP, subject.multiple, subject.key)
    truth.check_cut(whole, dense, TP, share, subject.layout, subject.key)
    return Made(subject, source, whole, unfinished, other, dense, share)


def _build(folder: Path, spec: Spec | Model) -> dict[str, Raw]:
    return part_models.build(folder, spec) if isinstance(spec, Model) else build(folder, spec)


def copy(origin: Path, out: Path) -> Path:
    """A folder of its own with the same files."""
    return Path(shutil.copytree(origin, out))
