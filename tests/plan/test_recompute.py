"""What a manifest says is recomputed by every reader; its own digest is right here, so that nothing else tells.

First what a hand would change, in every command; then every single value, in the readers that take weights.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.manifests import edit_manifest, tensor
from tests.support.recomputing import Made, no_value_is_believed, refusals
from tests.support.running import reshard, split

Manifest = dict[str, Any]
GATE_UP, DOWN = "gate_up_proj.weight", "down_proj.weight"
UP = "model.layers.0.mlp.up_proj"


SETS = {
    "bf16": (Spec("bf16", 128, 256), Cut(2)),
    "fp8_block": (Spec("fp8_block", 256, 512, dense=1), Cut(2)),
    "modelslim_static": (Spec("modelslim_static", 128, 256, dense=1), Cut(2)),
    "modelslim_mix": (Spec("modelslim_mix", 128, 256, dense=1), Cut(2, "separate")),
    "padded": (Spec("bf16", 128, 250, dense=1), Cut(4, pad=True)),
    "converted": (Spec("fp8_block", 256, 512, dense=1), Cut(2, weights="w8a8")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            spec, cut = SETS[name]
            build(folder / "model", spec)
            split(folder / "model", folder / "set", cut)
            found[name] = Made(folder / "model", folder / "set")
        return found[name]

    return make


def exchanged(manifest: Manifest) -> None:
    for one, other in zip(*(shard["tensors"] for shard in manifest["shards"]), strict=True):
        one["slices"], other["slices"] = other["slices"], one["slices"]


def renamed(manifest: Manifest) -> None:
    for shard in manifest["shards"]:
        for entry in shard["tensors"]:
            for piece in entry["slices"]:
                layer = "layers.1" if "layers.0" in piece["tensor"] else "layers.0"
                piece["tensor"] = layer.join(piece["tensor"].split(f"layers.{piece['tensor'].split('.')[2]}"))


def same_as(name: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        for rank in (0, 1):
            tensor(manifest, rank, DOWN)["same_as"] = [name]

    return change


def resliced(name: str, **values: Any) -> Callable[[Manifest], None]:
    return lambda m: tensor(m, 1, name)["slices"][0].update(values)


def reshaped(manifest: Manifest) -> None:
    """A slice of a source tensor that would be larger, on all ranks alike."""
    for rank in (0, 1):
        for piece in tensor(manifest, rank, GATE_UP)["slices"]:
            piece["shape"] = [512, 128]


def half(manifest: Manifest) -> None:
    """A model of half the layers."""
    for shard in manifest["shards"]:
        shard["tensors"] = [entry for entry in shard["tensors"] if ".0." in entry["name"]]
    manifest["layers"] = manifest["layers"][:1]


def block(*sizes: int) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        for linear in manifest["layers"][0]["linears"].values():
            linear["block"] = list(sizes)

    return change


def schemes(name: str) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        manifest["scheme"] = name
        for linear in manifest["layers"][0]["linears"].values():
            linear["scheme"] = name

    return change


def conversions(**values: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        for shard in manifest["shards"]:
            for entry in shard["tensors"]:
                entry["conversion"].update(values)

    return change


def more_in_order(manifest: Manifest) -> None:
    manifest["shards"][0]["tensors"].reverse()


# The set, the change, and what one of the readers' lines says.
CHANGES: dict[str, tuple[str, Callable[[Manifest], object], str]] = {
    "one digit of at": (
        "bf16",
        lambda m: tensor(m, 1, GATE_UP)["slices"][1].update(at=127),
        "manifest.json: .*rank-00001.*: model.layers.0.mlp.gate_up_proj.weight: is of .* at 127, a cut gives .* at 128",
    ),
    "ranks' slices exchanged": ("bf16", exchanged, r"dim 1 128\.\.256 at 0, a cut gives .*dim 1 0\.\.128 at 0"),
    "layers renamed": ("bf16", renamed, r"is of model\.layers\.1\.mlp\.\w+\.weight .*a cut gives model\.layers\.0\."),
    "same_as of another layer": ("bf16", same_as("model.layers.1.mlp.down_proj.weight"), "same_as is|in two ways"),
    "same_as of another module": ("bf16", same_as("lm_head.weight"), r"same_as is \('lm_head.weight',\), a cut gives"),
    "an expert's tensor": ("bf16", resliced(DOWN, tensor="model.layers.2.mlp.experts.0.down_proj.weight"), "positions"),
    "a slice of another shape": ("bf16", reshaped, r"positions 0\.\.256 of dim 0, it has 512"),
    "a gap": ("bf16", resliced(GATE_UP, start=129), r"no shard holds positions 128\.\.129 of dim 0"),
    "an overlap": ("bf16", resliced(GATE_UP, start=127, stop=255), r"no shard holds positions 128\.\.127 of dim 0"),
    "a tensor listed twice": (
        "bf16", lambda m: m["shards"][0]["tensors"].append(m["shards"][0]["tensors"][0]), "is there twice",
    ),
    "a tensor left out": ("bf16", half, r"num_hidden_layers is|layers|the file has it, manifest.json does not name it"),
    "another order": ("bf16", more_in_order, "its tensors are in the order"),
    "padding that nothing needs": (
        "bf16", lambda m: m.update(padding={"padded_size": 512, "multiple": 1}), "padding is .* it None"
    ),
    "padding left out": ("padded", lambda m: m.update(padding=None), "250 is not divisible by tp 4"),
    "padding to more": ("padded", lambda m: m["padding"].update(multiple=3), "padding is .*multiple=3"),
    "the other layout": ("bf16", lambda m: m.update(layout="separate"), "gate_proj.weight: missing; a cut has it"),
    "a block of 129": ("fp8_block", block(129, 128), "blocks of 129 x 128, its .* make it fp8_block in blocks of 128"),
    "a block of 64": ("fp8_block", block(64, 64), "blocks of 64 x 64, its .* make it fp8_block in blocks of 128"),
    "a block where none is": ("modelslim_static", block(128, 128), "gate_up_proj of layer 0 is .* in blocks of 128"),
    "the scheme of the same tensors": ("modelslim_mix", schemes("w8a8_static"), "manifest.json says w8a8_static"),
    "another activation": (
        "bf16",
        lambda m: m["layers"][1].update(activation={"name": "gelu", "limit": None}),
        "layer 1's activation is gelu, config.json makes it silu",
    ),
    "another rule": ("converted", conversions(rule="cast_to_bf16"), "made by cast_to_bf16 of .* no conversion gives"),
    "other inputs": ("converted", conversions(inputs=[]), "made by quantise_to_int8_per_channel of , which no conv"),
    "no conversion on one rank": (
        "converted", lambda m: tensor(m, 1, DOWN).update(conversion=None), "is described in two ways"
    ),
    "a file that goes with no set": (
        "bf16",
        lambda m: m["files"].append({**m["files"][0], "name": "model-00001-of-00001.safetensors"}),
        "model-00001-of-00001.safetensors is no file that goes with a set",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_reader_refuses_what_was_changed(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    which, change, says = CHANGES[name]
    shards = Path(shutil.copytree(made(which).shards, tmp_path / "set"))
    before = (shards / "manifest.json").read_bytes()
    edit_manifest(shards, change)
    assert (shards / "manifest.json").read_bytes() != before
    said = list(refusals(made(which), shards, tmp_path))
    for reader, text in said:
        if reader in {"inspect", "merge", "re-cut", "load"}:
            assert len(text.strip().splitlines()) == 1, reader
    assert all(re.search(says, text) for reader, text in said if reader == "load"), said


def test_every_reader_takes_what_was_not_changed(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Without it the tests above could pass on refusals of whatever was written again."""
    for name in SETS:
        shards = Path(shutil.copytree(made(name).shards, tmp_path / name))
        edit_manifest(shards, lambda manifest: None)
        assert reshard("merge", shards, tmp_path / f"{name}-merged", "--quiet").code == 0
        assert reshard("check", shards).code == 0
        assert reshard("verify", shards, "--source", made(name).source, "--quiet").code == 0


# --- every single value ---


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "modelslim_static", "padded", "converted"])
def test_no_single_value_is_believed(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    no_value_is_believed(Path(shutil.copytree(made(name).shards, tmp_path / "set")), made(name).load)
