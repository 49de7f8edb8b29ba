"""The bytes that are written, against the table written out by hand."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from reshard.errors import SchemeError
from reshard.plan.pipeline import Cut
from reshard.writer.split import SplitOptions
from tests.support.builders import (
    RECIPES,
    Raw,
    Spec,
    build,
    dense_only,
    read_folder,
    read_safetensors,
    write_safetensors,
)
from tests.support.cut_by_hand import BLOCK, GROUP, check_set, expected_rank
from tests.support.running import split
from tests.support.sets import snapshot

MIXED = {
    "static gate and up, FLOAT down": Spec("modelslim_v0_static", down_recipe="bf16"),
    "dynamic gate and up, static down": Spec("modelslim_dynamic", down_recipe="modelslim_static"),
    "mixed gate and up, dynamic down": Spec("modelslim_mix", down_recipe="modelslim_v0_dynamic"),
}
SPECS = {name: Spec(name) for name in RECIPES} | MIXED


# --- every recipe, every real checkpoint ---


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("name", SPECS)
def test_unpadded(tmp_path: Path, name: str, layout: str) -> None:
    dense = dense_only(build(tmp_path / "source", SPECS[name]))
    for tp in (1, 2, 4):
        split(tmp_path / "source", tmp_path / f"tp{tp}", Cut(tp, layout))
        check_set(tmp_path / f"tp{tp}", dense, tp, 512 // tp, layout)


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("name", SPECS)
def test_padded(tmp_path: Path, name: str, layout: str) -> None:
    """I = 300 is on no grid and odd over 8; the last ranks of a block scheme hold nothing but zeros."""
    spec = Spec(**{**vars(SPECS[name]), "intermediate": 300})
    dense = dense_only(build(tmp_path / "source", spec))
    rules = {rule for _, rule in RECIPES[spec.recipe].tensors.values()}
    multiple = BLOCK if "blocks" in rules else GROUP if "groups" in rules else 1
    for tp in (1, 2, 4, 8):
        share = -(-300 // (tp * multiple)) * multiple
        if tp == 1 and layout == "separate":
            share = 300  # one rank, nothing stacked: nothing needs the grid
        split(tmp_path / "source", tmp_path / f"tp{tp}", Cut(tp, layout, pad=True))
        check_set(tmp_path / f"tp{tp}", dense, tp, share, layout)


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_checkpoints_of_real_tools(tmp_path: Path, real_checkpoint: Path, layout: str) -> None:
    dense = dense_only(read_folder(real_checkpoint))
    assert dense
    for tp in (1, 2, 4):
        split(real_checkpoint, tmp_path / f"tp{tp}", Cut(tp, layout))
        check_set(tmp_path / f"tp{tp}", dense, tp, 512 // tp, layout)
        for side in ("config.json", "quant_model_description.json"):
            if (real_checkpoint / side).exists():
                assert (tmp_path / f"tp{tp}" / side).read_bytes() == (real_checkpoint / side).read_bytes()


# --- what goes wrong most easily ---


def patterned(folder: Path, recipe: str, size: int) -> dict[str, Raw]:
    """A checkpoint of one layer whose bytes come from arithmetic alone: the same for ever."""
    spec = Spec(recipe, hidden=size, intermediate=size, dense=1, files=1, index=False)
    tensors = build(folder, spec)
    made = {
        name: (dtype, shape, bytes((place * 7 + number * 31) % 251 for place in range(len(data))))
        for number, (name, (dtype, shape, data)) in enumerate(tensors.items())
    }
    for name in made:
        if name.startswith("model.layers.0.mlp.up_proj.input_"):
            made[name] = made[name.replace("up_proj", "gate_proj")]
    write_safetensors(folder / "model-00001-of-00001.safetensors", made)
    return made


GOLDEN = {
    ("modelslim_v0_static", 2, "fused", False): [
        "ab9a43f5f305432fb9080a7527652cc5f447181eee94134bfeecb895b15f51a2",
        "76df05361688fcc6f0d25057e40a23ccbaaf3a8847e70a5a796e03f569b517f4",
    ],
    ("modelslim_v0_static", 2, "separate", False): [
        "ecd5cb79268de0a69d2d7603f294a1a4f5c25139a4bc1ceb537206ec14b0e60f",
        "49011a801966330c19107bd6bad4bec4f33a9bfc4a82a51cc8f45b25d1be1153",
    ],
    ("bf16", 3, "fused", True): [
        "96a11f6e7aca9ddfd481536111fe83383aa74e0cf526d546871fb76f67620f4b",
        "7c9e49b0e321365ae5933a66c94f53759e34dffc49e7437f2099f1a5df041577",
        "88d62f3c88b7759506cba4366c0fbde48e577df0961bc4dd119b5d9e464befa1",
    ],
    ("fp8_block", 1, "fused", True): ["827daf6a3cf70b3b649dc5f6b6dc0bcd0a343eb4b16e33341bb3df6812524d32"],
}


@pytest.mark.parametrize(("recipe", "tp", "layout", "pad"), GOLDEN)
def test_golden_bytes(tmp_path: Path, recipe: str, tp: int, layout: str, pad: bool) -> None:
    """Another digest here is another file format: engines and existing sets would notice."""
    dense = dense_only(patterned(tmp_path / "source", recipe, 8))
    share = 128 if recipe == "fp8_block" else -(-8 // tp)
    split(tmp_path / "source", tmp_path / "out", Cut(tp, layout, pad))
    check_set(tmp_path / "out", dense, tp, share, layout)
    digests = [blake3(path.read_bytes()).hexdigest() for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert digests == GOLDEN[recipe, tp, layout, pad]


@pytest.mark.parametrize("tp", [2, 4])
def test_the_stacked_matrix_is_never_sliced(tmp_path: Path, tp: int) -> None:
    """All of gate is 1 and all of up is 2. A cut of the stacked matrix gives the first ranks no 2 at all."""
    source = tmp_path / "source"
    tensors = build(source, Spec("ct_dynamic", files=1, index=False))
    for name, (dtype, shape, data) in tensors.items():
        if ".gate_proj." in name:
            tensors[name] = (dtype, shape, b"\1" * len(data))
        elif ".up_proj." in name:
            tensors[name] = (dtype, shape, b"\2" * len(data))
    write_safetensors(source / "model-00001-of-00001.safetensors", tensors)
    split(source, tmp_path / "out", Cut(tp))
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, (_, shape, data) in read_safetensors(path).items():
            if ".gate_up_proj." in name:
                assert shape[0] == 2 * 512 // tp
                half = len(data) // 2
                assert set(data[:half]) == {1}, f"{path.name}: {name}: the first half is not gate alone"
                assert set(data[half:]) == {2}, f"{path.name}: {name}: the second half is not up alone"


@pytest.mark.parametrize(
    "recipe", ["modelslim_static", "modelslim_v0_static", "modelslim_mix", "modelslim_fp16_static"]
)
def test_quant_bias_is_added_once(tmp_path: Path, recipe: str) -> None:
    dense = dense_only(build(tmp_path / "source", Spec(recipe)))
    split(tmp_path / "source", tmp_path / "out", Cut(4))
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.quant_bias"
        held = [read_safetensors(path)[name] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
        biases = [np.frombuffer(data, np.int32) for _, _, data in held]
        assert np.array_equal(biases[0], np.frombuffer(dense[name][2], np.int32))
        assert biases[0].any()
        assert [bias.any() for bias in biases[1:]] == [False, False, False]
        assert {shape for _, shape, _ in held} == {(256,)}


@pytest.mark.parametrize("suffix", ["input_scale", "input_offset"])
def test_what_gate_and_up_share_must_be_the_same(tmp_path: Path, suffix: str) -> None:
    """The fused layout holds one for both. Apart, each keeps its own."""
    source = tmp_path / "source"
    tensors = build(source, Spec("modelslim_static", files=1, index=False))
    names = [f"model.layers.1.mlp.{role}.{suffix}" for role in ("gate_proj", "up_proj")]
    for name, value in zip(names, (b"\x80\x3f", b"\x00\x40"), strict=True):  # 1.0 and 2.0
        tensors[name] = ("BF16", (1,), value)
    write_safetensors(source / "model-00001-of-00001.safetensors", tensors)
    with pytest.raises(SchemeError) as caught:
        split(source, tmp_path / "out", Cut(2))
    assert f"{names[0]} is 1, {names[1]} is 2" in str(caught.value)
    assert "--layout separate" in str(caught.value)
    assert not (tmp_path / "out").exists()
    split(source, tmp_path / "out", Cut(2, "separate"))
    check_set(tmp_path / "out", dense_only(tensors), 2, 256, "separate")


# --- the same bytes, whatever the run ---


@pytest.mark.parametrize("spec", [Spec("modelslim_v0_static"), Spec("fp8_block", intermediate=1024), Spec("fp32")])
def test_the_same_bytes_for_any_workers_and_again(tmp_path: Path, spec: Spec) -> None:
    build(tmp_path / "source", spec)
    for number, workers in enumerate((1, 4, 1)):
        split(tmp_path / "source", tmp_path / str(number), Cut(8), SplitOptions(workers=workers))
    first = snapshot(tmp_path / "0")
    assert "manifest.json" in first
    assert snapshot(tmp_path / "1") == first
    assert snapshot(tmp_path / "2") == first


@pytest.mark.parametrize("recipe", ["bf16", "modelslim_dynamic", "fp8_block"])
def test_no_host_path_and_no_clock(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checkpoint in two places, one day later in the second: the same files."""
    places = [tmp_path / "one-host" / "r1", tmp_path / "other" / "deeper" / "r1"]
    outs = [tmp_path / "first-out", tmp_path / "second-out"]
    real = time.time
    for day, (place, out) in enumerate(zip(places, outs, strict=True)):
        build(place, Spec(recipe))
        for path in place.iterdir():
            path.touch()
        monkeypatch.setattr(time, "time", lambda day=day: real() + 86400 * day)
        split(place, out, Cut(2))
    assert snapshot(outs[0]) == snapshot(outs[1])
    for name, data in snapshot(outs[0]).items():
        for word in (tmp_path.name, "one-host", "first-out"):
            assert word.encode() not in data, f"{name}: holds {word}"


# --- safetensors' own reader ---


def read_with_safetensors(path: Path, framework: str, names: Iterable[str]) -> dict[str, bytes]:
    from safetensors import safe_open

    found = {}
    with safe_open(path, framework=framework) as reader:
        assert sorted(reader.keys()) == sorted(names)
        for name in names:
            tensor = reader.get_tensor(name)
            if framework == "pt":
                import torch

                found[name] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            else:
                found[name] = tensor.tobytes()
    return found


@pytest.mark.parametrize("name", SPECS)
def test_safetensors_reads_every_shard(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    dense = dense_only(build(tmp_path / "source", SPECS[name]))
    split(tmp_path / "source", tmp_path / "out", Cut(2))
    for rank, path in enumerate(sorted((tmp_path / "out").glob("*.safetensors"))):
        wanted = expected_rank(dense, 2, rank, 256, "fused")
        data = {tensor: raw[2] for tensor, raw in wanted.items()}
        assert read_with_safetensors(path, "pt", wanted) == data
        if not {raw[0] for raw in wanted.values()} & {"BF16", "F8_E4M3"}:  # types that numpy lacks
            assert read_with_safetensors(path, "np", wanted) == data


# --- a set is a source ---


AGAIN = {
    "bf16": (Spec("bf16", intermediate=1024), Cut(8)),
    "static": (Spec("modelslim_v0_static", intermediate=1024), Cut(8)),
    "mixed": (MIXED["static gate and up, FLOAT down"], Cut(8)),
    "fp16 with I64 scales": (Spec("modelslim_fp16_static"), Cut(8)),
    "fp8 in blocks": (Spec("fp8_block", intermediate=1024), Cut(8)),
    "separate": (Spec("ct_static_asymmetric"), Cut(8, "separate")),
    "padded rows": (Spec("modelslim_v0_static", intermediate=300), Cut(8, pad=True)),
    "padded blocks": (Spec("fp8_block", intermediate=576), Cut(8, pad=True)),
    "a rank of zeros": (Spec("int8_block", intermediate=300), Cut(8, "separate", pad=True)),
}


@pytest.mark.parametrize("name", AGAIN)
def test_cut_again_and_again(tmp_path: Path, name: str) -> None:
    """8 -> 4 -> 2 -> 8: each set is, file by file, what the original would have given."""
    spec, cut = AGAIN[name]
    build(tmp_path / "source", spec)
    direct = {}
    for tp in (8, 4, 2):
        split(tmp_path / "source", tmp_path / f"direct{tp}", replace(cut, tp_size=tp))
        direct[tp] = snapshot(tmp_path / f"direct{tp}")
        assert "manifest.json" in direct[tp]
    before = tmp_path / "direct8"
    for number, tp in enumerate((4, 2, 8)):
        after = tmp_path / f"again{number}"
        split(before, after, replace(cut, tp_size=tp))
        assert snapshot(after) == direct[tp], f"{before.name} to tp {tp}"
        before = after


@pytest.mark.parametrize("spec", [Spec("modelslim_v0_static"), Spec("fp8_block", intermediate=576)])
def test_a_set_in_one_layout_makes_one_in_the_other(tmp_path: Path, spec: Spec) -> None:
    build(tmp_path / "source", spec)
    for layout in ("fused", "separate"):
        split(tmp_path / "source", tmp_path / layout, Cut(4, layout, pad=True))
    split(tmp_path / "fused", tmp_path / "separated", Cut(4, "separate", pad=True))
    split(tmp_path / "separate", tmp_path / "stacked", Cut(4, "fused", pad=True))
    assert snapshot(tmp_path / "separated") == snapshot(tmp_path / "separate")
    assert snapshot(tmp_path / "stacked") == snapshot(tmp_path / "fused")


@pytest.mark.parametrize("recipe", ["fp32", "modelslim_v0_static", "bf16"])
@pytest.mark.parametrize("stage", [4096, 12288, None])
def test_rows_that_cross_the_steps_of_writing(
    tmp_path: Path, recipe: str, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are gathered step by step; rows of odd length begin and end in the middle of them."""
    if stage is not None:
        monkeypatch.setattr("reshard.writer.stream.STAGE_BYTES", stage)
    spec = Spec(recipe, hidden=555, intermediate=701, dense=1)
    dense = dense_only(build(tmp_path / "source", spec))
    for tp in (1, 2, 5):
        split(tmp_path / "source", tmp_path / f"tp{tp}", Cut(tp, pad=True))
        check_set(tmp_path / f"tp{tp}", dense, tp, -(-701 // tp), "fused")
