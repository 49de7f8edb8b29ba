"""Shard sets, made and damaged, and what verify finds in them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reshard.checks.finding import Finding
from reshard.manifest import parse_manifest
from reshard.model.naming import MANIFEST, shard_file
from reshard.model.parts import DENSE_FFN
from reshard.plan.pipeline import Cut, prepare
from reshard.source.base import read_header
from reshard.source.open import describe, open_source
from reshard.verification.compute import LayerResult
from reshard.verification.source import compare_with_source
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Raw, Spec, build, read_safetensors, write_safetensors

MLP = "model.layers.{}.mlp.{}"
GATE_UP, DOWN = MLP.format(0, "gate_up_proj.{}"), MLP.format(0, "down_proj.{}")


def split(source: Path, out: Path, cut: Cut) -> Path:
    with open_source(str(source)) as opened:
        write_shards(prepare(opened, cut), out, SplitOptions(workers=2))
    return out


@dataclass
class Verdict:
    findings: list[Finding]
    computed: list[Finding]
    layers: list[LayerResult]
    all_layers: list[int | None]

    def clean(self) -> bool:
        within = all(layer.difference <= layer.bound for layer in self.layers)
        all_computed = [layer.layer for layer in self.layers] == self.all_layers
        return not self.findings and not self.computed and within and all_computed

    def where(self, check: str) -> list[str]:
        return [finding.where for finding in self.findings if finding.check == check]


@contextlib.contextmanager
def one_byte_changed(path: Path, at: float, mask: int, *, any_place: bool) -> Iterator[str]:
    """Gives the name of the tensor that is hit. any_place: else at a tensor's start, as few places hit small ones."""
    before = path.read_bytes()
    with open_source(str(path.parent)) as opened:
        tensors = read_header(opened, path.name).tensors
    name = sorted(tensors)[int(at * len(tensors))]
    first = min(info.start for info in tensors.values())
    place = first + int(at * (len(before) - first)) if any_place else tensors[name].start + int(at * 2)
    try:
        path.write_bytes(before[:place] + bytes([before[place] ^ mask]) + before[place + 1 :])
        yield next(name for name, info in tensors.items() if info.start <= place < info.stop)
    finally:
        path.write_bytes(before)


def verify(shards: Path, source: Path) -> Verdict:
    ticks: list[int] = []
    with open_source(str(shards)) as cut, open_source(str(source)) as original:
        manifest = parse_manifest((shards / MANIFEST).read_bytes())
        checkpoint = describe(original, part=manifest.what)
        found, layers = compare_with_source(cut, manifest, original, checkpoint, ticks.append)
        computed = [finding for finding in found if finding.check == "computation"]
        findings = [finding for finding in found if finding not in computed]
        if not findings:  # fused input_* are compared twice
            stored = sum(
                read_header(cut, s.file).file_size - read_header(cut, s.file).data_start for s in manifest.shards
            )
            assert stored <= sum(ticks) < stored + 100 * len(manifest.shards)
    return Verdict(findings, computed, layers, [layer.index for layer in checkpoint.layers])


def made(tmp_path: Path, spec: Spec, cut: Cut) -> tuple[Path, Path]:
    build(tmp_path / "source", spec)
    return tmp_path / "source", split(tmp_path / "source", tmp_path / "shards", cut)


def always(data: bytes) -> Callable[[bytes], bytes]:
    """A change for `patch`: those bytes, whatever was there."""
    return lambda before: data


def patch(
    shards: Path,
    tp_rank: int,
    tp_size: int,
    name: str,
    change: Callable[[bytes], bytes],
    part: str = DENSE_FFN.key,
) -> None:
    """Other bytes for a tensor, in its place."""
    path = shards / shard_file(tp_rank, tp_size, part)
    with open_source(str(shards)) as opened:
        info = read_header(opened, path.name).tensors[name]
    raw = bytearray(path.read_bytes())
    raw[info.start : info.stop] = change(bytes(raw[info.start : info.stop]))
    path.write_bytes(raw)


def rewrite(shards: Path, tp_rank: int, tp_size: int, change: Callable[[dict[str, Raw]], object]) -> None:
    """Other tensors for a shard."""
    path = shards / shard_file(tp_rank, tp_size)
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors, {"format": "pt"})


def exchange(shards: Path, part: str = DENSE_FFN.key) -> None:
    """Put rank 0's file in rank 1's place and the reverse."""
    one, other = (shards / shard_file(rank, 2, part) for rank in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def read_all(folder: Path) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    for path in folder.glob("*.safetensors"):
        found |= read_safetensors(path)
    return found
