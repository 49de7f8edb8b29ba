"""Cuts that the sizes or values do not allow, and shard sets that are not whole."""

from dataclasses import replace
from pathlib import Path

from reshard.errors import AlignmentError, ManifestError, SchemeError
from reshard.model.naming import shard_file
from tests.support.builders import Spec
from tests.support.corrupt import (
    AGAIN,
    GATE,
    UP,
    Case,
    edited_manifest,
    flipped,
    removed,
    replaced,
    resized,
    tensors,
    unharmed,
    written,
)
from tests.support.manifests import tensor

RANK_1 = shard_file(1, 2)
OTHER_VERSION = "use the reshard that wrote it|again"


def unequal_scales(folder: Path) -> None:
    """gate's input_scale is 2.0, up's 3.0, as BF16."""
    values = {GATE: b"\x00\x40", UP: b"\x40\x40"}
    tensors(lambda every: every.update({f"{m}.input_scale": ("BF16", (1,), v) for m, v in values.items()}))(folder)


_CUTS = [
    Case("tp 0", unharmed, ("tp 0",), "use a tp from 1", AlignmentError, tp_size=0),
    Case("tp greater than I", unharmed, ("tp 513", "512"), "use at most 512", AlignmentError, tp_size=513),
    Case(
        "I not divisible",
        unharmed,
        (f"{GATE}.weight", "512", "tp 3", "1, 2, 4, 8, 16", "--pad"),
        "use a tp of",
        AlignmentError,
        tp_size=3,
    ),
    Case(
        "share off the block grid",
        unharmed,
        (f"{GATE}.weight", "dim 0 = 1152", "tp 2", "576 rows", "128-row", "1, 3, 9;", "--pad", "--weights bf16"),
        "use a tp of",
        AlignmentError,
        Spec("fp8_block", intermediate=1152),
    ),
    Case(
        "I itself off the block grid",
        unharmed,
        (f"{GATE}.weight", "dim 0 = 576", "tp 2", "288 rows", "128-row", "--weights bf16"),
        "use --pad",
        AlignmentError,
        Spec("fp8_block", intermediate=576),
    ),
    Case(
        "gate and up of different input_scale",
        unequal_scales,
        (f"{GATE}.input_scale is 2,", f"{UP}.input_scale is 3;"),
        "use --layout separate",
        SchemeError,
        Spec("modelslim_static"),
    ),
]

_SETS = [
    Case(
        "set without a manifest",
        removed("manifest.json"),
        ("set", "manifest.json", "incomplete"),
        "--resume",
        ManifestError,
    ),
    Case("set without a shard", removed(RANK_1), (RANK_1, "manifest.json", "missing"), "copy the whole set"),
    Case("set with a shard cut short", resized(RANK_1, -8), (RANK_1, "manifest.json"), AGAIN),
    Case("set with a changed shard", flipped(RANK_1, -1), (RANK_1, "BLAKE3", "manifest.json"), AGAIN),
    Case(
        "set of another version",
        edited_manifest(lambda m: m.update(schema="denseffn-shards/3")),
        ("manifest.json", "'denseffn-shards/3'", "'denseffn-shards/2'"),
        "use the reshard that wrote it",
        ManifestError,
    ),
    Case(
        "set with an unknown field",
        edited_manifest(lambda m: m["shards"][1].update(colour="red")),
        ("manifest.json", "shards.1.colour", "red"),
        OTHER_VERSION,
        ManifestError,
    ),
    Case(
        "set with an entry missing",
        edited_manifest(lambda m: m["shards"].pop()),
        ("manifest.json", "[0]", "0 to 1", "tp_size 2"),
        OTHER_VERSION,
        ManifestError,
    ),
    Case(
        "set of more ranks than numbers",
        edited_manifest(lambda m: m.update(tp_size=2**70)),
        ("manifest.json", "tp_size", str(2**70)),
        OTHER_VERSION,
        ManifestError,
    ),
    Case(
        "set with a shared value that no slice holds",
        edited_manifest(lambda m: tensor(m, 0, "gate_up_proj.input_scale").update(slices=[])),
        ("manifest.json", f"{UP}.input_scale"),
        OTHER_VERSION,
        ManifestError,
        Spec("modelslim_static"),
    ),
    Case(
        "set with a slice of a dimension that is not there",
        edited_manifest(lambda m: tensor(m, 0, "gate_up_proj.deq_scale")["slices"][0].update(dim=1)),
        ("manifest.json", f"{GATE}.deq_scale"),
        OTHER_VERSION,
        ManifestError,
        Spec("modelslim_static"),
    ),
    Case("manifest not JSON", written("manifest.json", b"{"), ("manifest.json", "JSON"), AGAIN, ManifestError),
    Case(
        "set without a side file",
        removed("config.json"),
        ("config.json", "manifest.json", "missing"),
        "copy the whole set",
    ),
    Case("set with a longer side file", resized("config.json", 1), ("config.json", "manifest.json"), AGAIN),
    Case(
        "set with a changed side file",
        replaced("config.json", b"deepseek_v3", b"deepseek_v2"),
        ("config.json", "manifest.json"),
        AGAIN,
    ),
    Case(
        "set with a tensor renamed in a shard",
        replaced(RANK_1, b"layers.0.mlp", b"layers.7.mlp"),
        (RANK_1, "model.layers.0.mlp.down_proj.weight", "manifest.json"),
        AGAIN,
    ),
]

CASES = [*_CUTS, *(replace(case, cut=True) for case in _SETS)]
