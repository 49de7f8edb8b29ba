"""What is run over a damaged subject, and what must be true if it ends with 0."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fuzz import loading, truth
from tests.fuzz.subjects import TP, Made, copy
from tests.support.builders import Raw
from tests.support.cut_by_hand import BLOCK

HERE = "http://here/"
"""Stands for the server's address, which is known when it runs."""
Proof = Callable[[], bool]
"""Called after exit code 0: True where something was written or loaded and is right. Raises AssertionError."""


def nothing() -> bool:
    """Nothing was written or loaded."""
    return False


@dataclass(frozen=True)
class Run:
    """A command line, or a call of load_shard; and the proof."""

    arguments: tuple[str, ...]
    proof: Proof = nothing
    call: Callable[[], Any] | None = None

    @property
    def line(self) -> str:
        """What to type."""
        return " ".join(self.arguments)

    @property
    def form(self) -> str:
        """What stdout carries."""
        return self.arguments[self.arguments.index("--format") + 1] if "--format" in self.arguments else "human"

    def at(self, place: str | None) -> "Run":
        """With the server's address in its place."""
        return replace(self, arguments=tuple(place if place and a == HERE else a for a in self.arguments))


def _command(*arguments: object, proof: Proof = nothing) -> Run:
    return Run(tuple(map(str, arguments)), proof)


def _form(rng: random.Random, *forms: str) -> tuple[str, ...]:
    form = rng.choice(["human", "json", *forms])
    return () if form == "human" else ("--format", form)


def _cut(place: Path, made: Made, dense: Mapping[str, Raw] | None = None, tp: int = TP) -> Proof:
    """That a set for `tp` ranks is of the subject's weights, or of others, in the subject's layout."""

    def proof() -> bool:
        weights = made.dense if dense is None else dict(dense)
        share = truth.share_of(weights, tp, made.subject.multiple, made.subject.key)
        truth.check_cut(place, weights, tp, share, made.subject.layout, made.subject.key)
        return True

    return proof


def of_set(
    rng: random.Random,
    made: Made,
    out: Path,
    folder: Path,
    weights_changed: bool = False,
    address: str | None = None,
) -> list[Run]:
    """Every reader of a set. weights_changed: its bytes, which only digests tell.

    address: where it is served, and not on this host.
    """
    subject, place = made.subject, address or out
    tp = rng.choice([1, 4] if subject.multiple == 1 else [1, 3])

    def is_right() -> bool:
        truth.check_cut(out, made.dense, TP, made.share, subject.layout, subject.key)
        truth.check_meaning(out, made.whole)
        return True

    def merged() -> bool:
        # What a manifest leaves out is no part of the set: no other promise.
        named = [file["name"] for file in json.loads((out / "manifest.json").read_bytes())["files"]]
        side_files = {name: (out / name).read_bytes() for name in named}
        truth.check_merged(folder / "merged", made.dense, side_files)
        return True

    def recut() -> bool:
        share = truth.share_of(made.dense, tp, 1, subject.key)
        truth.check_cut(folder / "recut", made.dense, tp, share, "fused", subject.key)
        return True

    found = [
        _command("inspect", place, *_form(rng)),
        _command("check", place, "--against", made.source, *_form(rng, "junit", "github")),
        _command("verify", place, "--quiet", *_form(rng), proof=is_right),
        _command("verify", place, "--source", made.source, "--quiet", *_form(rng), proof=is_right),
        _command("merge", place, folder / "merged", "--quiet", proof=merged),
        _command("split", place, folder / "recut", "--tp", tp, "--quiet", proof=recut),
    ]
    if address is None:
        found += loading.loads(rng, made, out, weights_changed)
        if _copied(out, again := folder / "again"):
            way = rng.choice(["--resume", "--overwrite"])
            command = ("split", made.source, again, "--tp", TP, way, "--quiet", *subject.options)
            found.append(_command(*command, proof=_cut(again, made)))
    return found


def _copied(out: Path, again: Path) -> bool:
    """A copy of a set that is about to be written into; what is no plain file there is not copied."""
    if any(not path.is_file() or path.stat().st_size > 1 << 30 for path in out.iterdir()):
        return False
    copy(out, again)
    return True


def of_source(rng: random.Random, made: Made, source: Path, folder: Path) -> list[Run]:
    """Every reader of a checkpoint."""
    subject = made.subject
    tp = rng.choice([TP, TP, 1])
    options = subject.options
    out, again = folder / "out", copy(made.unfinished, folder / "again")

    def cut_into(place: Path, size: int, converted: bool = False) -> Proof:
        def cut() -> bool:
            if truth.blocks_of(source) != [BLOCK, BLOCK]:
                return False  # the truth is another, and not one that is computed here
            dense = truth.dense_of(source, subject.key)
            weights = truth.as_bf16(dense) if converted else dense
            return weights is not None and _cut(place, made, weights, size)()

        return cut

    def same() -> bool:
        assert truth.dense_of(source, subject.key) == made.dense, "the source holds other weights than the set"
        return True

    found = [
        _command("inspect", source, *subject.part, *_form(rng)),
        _command("check", source, "--tp", f"{TP},4", *subject.pad, *subject.part, *_form(rng, "junit", "github")),
        _command("split", source, out, "--tp", tp, "--quiet", *options, proof=cut_into(out, tp)),
        _command("split", source, again, "--tp", TP, "--quiet", "--resume", *options, proof=cut_into(again, TP)),
        _command("verify", made.whole, "--source", source, "--quiet", *_form(rng), proof=same),
        _command("check", made.whole, "--against", source),
    ]
    if subject.name == "fp8":
        command = ("split", source, folder / "bf16", "--tp", TP, "--quiet", "--weights", "bf16")
        found.append(_command(*command, proof=cut_into(folder / "bf16", TP, converted=True)))
    if (source / "config.json").is_file():
        found += [
            _command(
                "check",
                source / "config.json",
                "--tp",
                f"{TP},4",
                *subject.pad,
                *subject.part,
                *_form(rng, "junit", "github"),
            ),
            _command("estimate", "--config", source / "config.json", "--tp", "1,2", *subject.pad, *_form(rng)),
        ]
    return found


def of_unfinished(rng: random.Random, made: Made, out: Path, folder: Path) -> list[Run]:
    """Readers of an unfinished set, and the command that goes on with it."""
    command = ("split", made.source, out, "--tp", TP, "--quiet", "--resume", *made.subject.options)
    return [
        _command("inspect", out),
        _command("check", out, *_form(rng, "junit", "github")),
        _command("verify", out, "--quiet"),
        *loading.loads(rng, made, out, weights_changed=True),
        _command(*command, proof=_cut(out, made)),
    ]


def of_address(address: str, rng: random.Random, made: Made, folder: Path) -> list[Run]:
    """Readers of a checkpoint that is not on this host."""
    options, part = made.subject.options, made.subject.part
    out, again = folder / "out", copy(made.unfinished, folder / "again")
    return [
        _command("inspect", address, *part, *_form(rng)),
        _command("check", address, "--tp", TP, *made.subject.pad, *part, *_form(rng, "junit", "github")),
        _command("split", address, out, "--tp", TP, "--quiet", *options, proof=_cut(out, made)),
        _command("split", address, again, "--tp", TP, "--quiet", "--resume", *options, proof=_cut(again, made)),
        _command("verify", made.whole, "--source", address, "--quiet", *_form(rng), proof=lambda: True),
    ]
