"""Checkpoints that store gate and up stacked (Phi-3, GLM-4-0414): each half is cut by its own rows, and put back."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import (
    RECIPES,
    Raw,
    Spec,
    config_of,
    description_of,
    read_folder,
    tensors_of,
    write_safetensors,
)
from tests.support.running import reshard

GATE, UP, STACKED = "gate_proj", "up_proj", "gate_up_proj"
ONE_FOR_BOTH = ("input_scale", "input_offset", "input_zero_point")
SIZES = {"I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


def stacked(tensors: dict[str, Raw]) -> dict[str, Raw]:
    """The same weights, gate above up in one tensor."""
    found = {}
    for name, (dtype, shape, data) in tensors.items():
        if f".mlp.{UP}." in name:
            continue
        if f".mlp.{GATE}." not in name:
            found[name] = (dtype, shape, data)
            continue
        _, other_shape, other = tensors[name.replace(GATE, UP)]
        both = name.replace(GATE, STACKED)
        if name.rpartition(".")[2] in ONE_FOR_BOTH:
            found[both] = (dtype, shape, data)
        else:
            found[both] = (dtype, (shape[0] + other_shape[0], *shape[1:]), data + other)
    return found


def write(folder: Path, spec: Spec) -> dict[str, Raw]:
    tensors = stacked(tensors_of(spec))
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config = config_of(spec)
    (folder / "config.json").write_text(json.dumps(config))
    types = description_of(spec, tensors_of(spec))
    if types is not None:
        for name in [name for name in types if f".mlp.{UP}." in name]:
            del types[name]
        types = {name.replace(f".mlp.{GATE}.", f".mlp.{STACKED}."): kind for name, kind in types.items()}
        (folder / RECIPES[spec.recipe].description_file).write_text(json.dumps(types))
    return tensors


def rows(raw: Raw, start: int, stop: int) -> bytes:
    dtype, shape, data = raw
    width = int(np.prod(shape[1:])) * SIZES[dtype]
    return data[start * width : stop * width]


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_block", "modelslim_dynamic", "modelslim_static", "ct_dynamic"])
def test_each_half_is_cut_by_its_own_rows_and_put_back(tmp_path: Path, recipe: str, layout: str) -> None:
    if recipe not in RECIPES:
        pytest.fail(f"no recipe {recipe}; there are {', '.join(RECIPES)}")
    tensors = write(tmp_path / "model", Spec(recipe))
    source, shards = tmp_path / "model", tmp_path / "shards"
    done = reshard("split", source, shards, "--tp", 2, "--layout", layout)
    assert done.code == 0, done.err
    for rank in range(2):
        held = read_folder(shards, f"*{rank:05d}-of-00002.safetensors")
        for layer in range(2):
            for name in [name for name in tensors if name.startswith(f"model.layers.{layer}.mlp.{STACKED}.")]:
                whole, suffix = tensors[name], name.rpartition(".")[2]
                if suffix in ONE_FOR_BOTH:
                    continue
                half = whole[1][0] // 2
                gate = rows(whole, rank * half // 2, (rank + 1) * half // 2)
                up = rows(whole, half + rank * half // 2, half + (rank + 1) * half // 2)
                if layout == "fused":
                    assert held[name][2] == gate + up
                else:
                    assert held[name.replace(STACKED, GATE)][2] == gate
                    assert held[name.replace(STACKED, UP)][2] == up
    for command in (("verify", shards, "--source", source), ("check", shards, "--against", source)):
        done = reshard(*command)
        assert done.code == 0, done.out + done.err
    assert reshard("merge", shards, tmp_path / "merged").code == 0
    assert read_folder(tmp_path / "merged") == {
        n: t for n, t in tensors.items() if ".mlp." in n and "_proj." in n and "expert" not in n
    }
    assert reshard("split", shards, tmp_path / "again", "--tp", 1).code == 0
    assert reshard("verify", tmp_path / "again", "--source", source).code == 0


def test_inspect_counts_a_stacked_tensor_once(tmp_path: Path) -> None:
    write(tmp_path / "model", Spec("bf16"))
    document = reshard("inspect", tmp_path / "model", "--format", "json").document
    assert document["part_bytes"] == 2 * 3 * 512 * 256 * 2
    gate, up = (document["layers"][0]["linears"][role]["tensors"][0] for role in (GATE, UP))
    assert gate["shape"] == up["shape"] == [512, 256]
    assert up["parts"][0]["offset"] - gate["parts"][0]["offset"] == 512 * 256 * 2


def refusal(tmp_path: Path, tensors: dict[str, Raw], *options: str, spec: Spec | None = None) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config_of(spec or Spec("bf16"))))
    done = reshard("split", folder, tmp_path / "out", "--tp", 2, *options)
    assert done.code == 1
    assert not (tmp_path / "out").exists()
    return done.err


def test_stacked_and_apart_in_one_layer_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(Spec("bf16"))
    both = stacked(tensors) | {n: t for n, t in tensors.items() if ".layers.1.mlp.gate_proj" in n}
    assert "model.layers.1.mlp: has gate_up_proj and gate_proj" in refusal(tmp_path, both)


def test_an_odd_stack_is_refused(tmp_path: Path) -> None:
    tensors = stacked(tensors_of(Spec("bf16")))
    name = "model.layers.0.mlp.gate_up_proj.weight"
    dtype, (height, width), data = tensors[name]
    tensors[name] = (dtype, (height - 1, width), data[: (height - 1) * width * 2])
    assert f"{name}: shape [1023, 256]; with gate_proj and up_proj stacked, dim 0 must be a multiple of 2" in refusal(
        tmp_path, tensors
    )


def test_blocks_that_are_of_gate_and_up_are_refused(tmp_path: Path) -> None:
    spec = Spec("fp8_block", intermediate=512 + 96)  # 2I / 128 is 9.5: ten rows of scales, of which none ends at I
    tensors = stacked(tensors_of(spec))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate_up_proj.weight_scale_inv"
        dtype, (_, width), data = tensors[name]
        tensors[name] = (dtype, (10, width), data[: 10 * width * 4])
    said = refusal(tmp_path, tensors, spec=spec)
    assert "the 608 rows of each are no multiple of the 128-row scale block" in said


def test_an_odd_number_of_blocks_is_of_gate_and_up(tmp_path: Path) -> None:
    spec = Spec("fp8_block", intermediate=320)  # 640 rows: five blocks of 128
    tensors = stacked(tensors_of(spec))
    name = "model.layers.0.mlp.gate_up_proj.weight_scale_inv"
    dtype, (_, width), data = tensors[name]
    tensors[name] = (dtype, (5, width), data[: 5 * width * 4])
    said = refusal(tmp_path, tensors, spec=spec)
    assert (
        f"{name}: shape [5, 2]: gate_proj and up_proj are stacked in 640 rows, and a block of scales is of both" in said
    )


def test_what_is_stacked_is_not_converted(tmp_path: Path) -> None:
    said = refusal(tmp_path, stacked(tensors_of(Spec("bf16"))), "--weights", "w8a8")
    assert "gate and up are stacked in the checkpoint" in said
    assert "--weights keep" in said
