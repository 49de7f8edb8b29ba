"""Manifests of o_proj, LM head and embedding that were changed, their own digest right: no reader takes one."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut
from reshard_runtime import load_tensors
from tests.support.builders import read_safetensors, write_safetensors
from tests.support.manifests import edit_manifest
from tests.support.part_models import Model, build
from tests.support.recomputing import Made, no_value_is_believed, refusals
from tests.support.running import reshard, split

Manifest = dict[str, Any]
SETS = {
    "o_proj": ("o_proj", Model("modelslim_v0_static"), Cut(2)),
    "o_proj in blocks": ("o_proj", Model("fp8_block"), Cut(2)),
    "converted": ("o_proj", Model("fp8_block"), Cut(2, weights="w8a8")),
    "lm_head": ("lm_head", Model(prefix="language_model.model."), Cut(2)),
    "embedding": ("embedding", Model(vocabulary=128), Cut(2)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            folder = tmp_path_factory.mktemp("set")
            key, model, cut = SETS[name]
            build(folder / "model", model)
            split(folder / "model", folder / "set", Cut(cut.tp_size, part=PARTS[key], weights=cut.weights))
            found[name] = Made(folder / "model", folder / "set", key)
        return found[name]

    return make


def words(old: str, new: str) -> Callable[[Manifest], object]:
    """Another word in every name of a source's tensor and of a shard's."""

    def change(manifest: Manifest) -> None:
        for shard in manifest["shards"]:
            for tensor in shard["tensors"]:
                tensor["name"] = tensor["name"].replace(old, new)
                for piece in tensor["slices"]:
                    piece["tensor"] = piece["tensor"].replace(old, new)

    return change


def renamed(key: str) -> Callable[[Manifest], object]:
    """Said to be of another part, its files' names too."""

    def change(manifest: Manifest) -> None:
        before, manifest["part"] = manifest["part"], key
        for shard in manifest["shards"]:
            shard["file"] = shard["file"].replace(f"{before}-rank", f"{key}-rank")

    return change


def slices(dim: int, *bounds: tuple[int, int]) -> Callable[[Manifest], object]:
    """The first tensor's slice of each rank."""

    def change(manifest: Manifest) -> None:
        for shard, (start, stop) in zip(manifest["shards"], bounds, strict=True):
            shard["tensors"][0]["slices"][0].update(dim=dim, start=start, stop=stop)

    return change


def exchanged(manifest: Manifest) -> None:
    for one, other in zip(*(shard["tensors"] for shard in manifest["shards"]), strict=True):
        one["slices"], other["slices"] = other["slices"], one["slices"]


def schemes(name: str) -> Callable[[Manifest], object]:
    def change(manifest: Manifest) -> None:
        manifest["scheme"] = name
        for layer in manifest["layers"]:
            layer["linears"]["o_proj"]["scheme"] = name

    return change


def bias_on_both(manifest: Manifest) -> None:
    first, second = (
        next(t for t in shard["tensors"] if t["name"].endswith("1.self_attn.o_proj.quant_bias"))
        for shard in manifest["shards"]
    )
    second["slices"] = first["slices"]


# The set, the change, what is said.
CHANGES: dict[str, tuple[str, Callable[[Manifest], object], str]] = {
    "ranks' slices exchanged": ("o_proj", exchanged, r"dim 1 128\.\.256 at 0, a cut gives .*dim 1 0\.\.128 at 0|zeros"),
    "ranks' rows exchanged": ("lm_head", exchanged, r"at 0, a cut gives|is not within|positions"),
    "the bias on both ranks": ("o_proj", bias_on_both, r"quant_bias: is of model.layers.1.*, a cut gives zeros"),
    "rows in place of columns": ("o_proj in blocks", slices(0, (0, 64), (64, 128)), "dim 0"),
    "the vocabulary halved before it is padded": (
        "lm_head", slices(0, (0, 50), (50, 100)), r"0\.\.50 at 0, a cut gives .* 0\.\.64 at 0",
    ),
    "padding left out": ("lm_head", lambda m: m.update(padding=None), "padding is None, the sizes make it .*=128"),
    "padding to more": ("lm_head", lambda m: m["padding"].update(padded_size=256), "padding is .*256.* make it .*128"),
    "padding of another multiple": ("lm_head", lambda m: m["padding"].update(multiple=128), "is .*multiple=128"),
    "padding that nothing needs": (
        "embedding", lambda m: m.update(padding={"padded_size": 192, "multiple": 64}), "padding is .* make it None",
    ),
    "columns padded": (
        "o_proj", lambda m: m.update(padding={"padded_size": 512, "multiple": 1}), "padding is .* make it None",
    ),
    "of another part": ("lm_head", renamed("embedding"), "lm_head|embed"),
    "of o_proj": ("embedding", renamed("o_proj"), "sizes are hidden_size, vocab_size, o_proj has attention_size"),
    "of the DenseFFN": ("o_proj", renamed("denseffn"), "the model's sizes are|denseffn has"),
    "an unknown part": ("o_proj", lambda m: m.update(part="kv_b_proj"), "unknown part kv_b_proj; known are denseffn"),
    "a table in a layer": ("embedding", lambda m: m["layers"][0].update(index=0), "and embedding is once"),
    "an o_proj in none": ("o_proj", lambda m: m["layers"][0].update(index=None), "and o_proj is every layer"),
    "another layer": ("o_proj", lambda m: m["layers"][1].update(index=5), "its layers lack|layers are"),
    "a layer behind the last": (
        "o_proj", lambda m: (words("layers.1.", "layers.7.")(m), m["layers"][1].update(index=7)),
        "num_hidden_layers is 2, and 7 is behind the last",
    ),
    "the MTP layer's": (
        "o_proj", lambda m: (words("layers.1.", "layers.2.")(m), m["layers"][1].update(index=2)), "layers|lack",
    ),
    "another module's": ("lm_head", words("language_model.", "draft."), "no LM head: no tensor is named"),
    "a prefix": ("lm_head", lambda m: m["model"].update(prefix=""), "prefix|lack"),
    "a prefix and the names": (
        "embedding",
        lambda m: (words("model.", "language_model.")(m), m["model"].update(prefix="language_model.")),
        "has it|lacks",
    ),
    "a size that it has not": ("lm_head", lambda m: m["model"].update(attention_size=256), "the model's sizes are"),
    "a size left out": ("o_proj", lambda m: m["model"].update(attention_size=None), "the model's sizes are"),
    "a vocabulary of more": ("lm_head", lambda m: m["model"].update(vocab_size=101), "is 101, .* make it 100"),
    "more values": ("o_proj", lambda m: m["model"].update(attention_size=512), "is 512, .* make it 256"),
    "an activation": (
        "o_proj", lambda m: m["layers"][0].update(activation={"name": "silu", "limit": None}),
        "layer 0's activation is silu, config.json makes it None",
    ),
    "another scheme": ("o_proj", schemes("w8a8_mix"), "w8a8_mix"),
    "another block": (
        "o_proj in blocks", lambda m: m["layers"][0]["linears"]["o_proj"].update(block=[64, 64]), "blocks of 64 x 64",
    ),
    "another linear": (
        "embedding",
        lambda m: m["layers"][0].update(linears={"lm_head": m["layers"][0]["linears"]["embed_tokens"]}),
        "linears are lm_head, expected embed_tokens",
    ),
    "the other layout": ("embedding", lambda m: m.update(layout="both"), "layout"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_reader_refuses_what_was_changed(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    which, change, says = CHANGES[name]
    one = made(which)
    shards = Path(shutil.copytree(one.shards, tmp_path / "set"))
    edit_manifest(shards, change)
    said = list(refusals(one, shards, tmp_path))
    for reader, text in said:
        assert "unforeseen" not in text, (reader, text)
        if reader in {"inspect", "merge", "re-cut", "load"}:
            assert len(text.strip().splitlines()) == 1, reader
    assert all(re.search(says, text) for reader, text in said if reader == "load"), said


def test_every_reader_takes_what_was_not_changed(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Without it the tests above could pass on refusals of whatever was written again."""
    for number, name in enumerate(SETS):
        one = made(name)
        shards = Path(shutil.copytree(one.shards, tmp_path / str(number)))
        edit_manifest(shards, lambda manifest: None)
        assert reshard("merge", shards, tmp_path / f"{number}-merged", "--quiet").code == 0
        assert reshard("check", shards).code == 0
        assert reshard("verify", shards, "--source", one.source, "--quiet").code == 0
        for rank in (0, 1):
            held = read_safetensors(shards / f"{one.part}-rank-0000{rank}-of-00002.safetensors")
            loaded = load_tensors(shards, rank, verify="digest")
            assert {n: tuple(t.shape) for n, t in loaded.items()} == {n: shape for n, (_, shape, _) in held.items()}


@pytest.mark.parametrize("name", ["o_proj", "lm_head", "converted"])
def test_no_single_value_is_believed(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    no_value_is_believed(Path(shutil.copytree(made(name).shards, tmp_path / "set")), made(name).load)


def test_every_layer_of_a_set_may_be_an_mtp_layers(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Said and written so throughout: what is left to cut then is nothing."""
    shards = Path(shutil.copytree(made("o_proj in blocks").shards, tmp_path / "set"))

    def change(manifest: Manifest) -> None:
        words("layers.1.", "layers.2.")(manifest)
        manifest["layers"] = manifest["layers"][1:]
        manifest["layers"][0]["index"] = 2
        for shard in manifest["shards"]:
            shard["tensors"] = [tensor for tensor in shard["tensors"] if "layers.2." in tensor["name"]]
            path = shards / shard["file"]
            held = {n.replace("s.1.", "s.2."): raw for n, raw in read_safetensors(path).items() if "layers.1." in n}
            named = {
                key: shard["file"] and str(value) for key, value in (("tp_rank", shard["tp_rank"]), ("tp_size", 2))
            }
            write_safetensors(path, held, {"format": "pt", "o_proj": "shard", **named})
            shard["size"] = path.stat().st_size

    edit_manifest(shards, change)
    done = reshard("inspect", shards)
    assert done.err == "error: no o_proj: only the MTP layer 2 has one\n"
