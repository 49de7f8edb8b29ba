"""`reshard verify --source`: no finding for what `split` writes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reshard.convert.rules import MODELSLIM
from reshard.manifest import parse_manifest
from reshard.model.activation import SILU, Activation
from reshard.model.naming import MANIFEST, shard_file
from reshard.plan.pipeline import Cut
from reshard.schemes.declare import COMPRESSED_TENSORS
from reshard.source.folder import FolderSource
from reshard.source.open import describe, open_source
from reshard.tensors.dtypes import nbytes
from reshard.tensors.memory import Bytes
from reshard.verification.layer import unsplit_layer
from reshard.verification.reference import stored_linear
from reshard.verification.source import compare_with_source
from tests.support.builders import CHECKPOINTS, RECIPES, Raw, Recipe, Spec, build, read_safetensors, write_safetensors
from tests.support.unsplit import exact, whole_layer
from tests.support.verifying import MLP, made, split, verify


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_real_checkpoints(real_checkpoint: Path, tp_size: int, layout: str, tmp_path: Path) -> None:
    assert verify(split(real_checkpoint, tmp_path / "shards", Cut(tp_size, layout)), real_checkpoint).clean()


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str, layout: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(recipe), Cut(2, layout))
    assert verify(shards, source).clean()


@pytest.mark.parametrize("weights", ["bf16", "w8a8"])
@pytest.mark.parametrize("quant_format", [MODELSLIM, COMPRESSED_TENSORS])
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if not recipe.scheme.startswith("w8a8")])
def test_converted(recipe: str, weights: str, quant_format: str, tmp_path: Path) -> None:
    spec = Spec(recipe, hidden=320, intermediate=768)
    source, shards = made(tmp_path, spec, Cut(3, "fused", weights=weights, quant_format=quant_format))
    assert verify(shards, source).clean()
    again = split(shards, tmp_path / "again", Cut(2, "separate"))
    assert verify(again, source).clean()
    assert verify(again, shards).clean()


def test_converted_rows_of_zeros(tmp_path: Path) -> None:
    def zeros(tensors: dict[str, Raw]) -> None:
        name = MLP.format(1, "down_proj.weight")
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, shape, bytes(3 * shape[1] * 2) + data[3 * shape[1] * 2 :]

    source = tmp_path / "source"
    build(source, Spec("bf16", files=1))
    tensors = read_safetensors(source / "model-00001-of-00001.safetensors")
    zeros(tensors)
    write_safetensors(source / "model-00001-of-00001.safetensors", tensors)
    shards = split(source, tmp_path / "shards", Cut(2, weights="w8a8"))
    scale = np.frombuffer(
        read_safetensors(shards / shard_file(1, 2))[MLP.format(1, "down_proj.weight_scale")][2], "<f4"
    )
    assert list(scale[:3]) == [1, 1, 1]
    assert verify(shards, source).clean()


@pytest.mark.parametrize(
    ("spec", "cut"),
    [
        (Spec("bf16", intermediate=500), Cut(3, pad=True)),
        (Spec("bf16", intermediate=3), Cut(2, "separate", pad=True)),
        (Spec("fp8_block", hidden=200, intermediate=500), Cut(3, pad=True)),
        (Spec("fp8_block", hidden=200, intermediate=500), Cut(4, "separate", pad=True)),
        (Spec("fp8_block", hidden=200, intermediate=500), Cut(1, "separate")),
        (Spec("ct_fp8_block", hidden=200, intermediate=300), Cut(8, pad=True)),  # ranks that hold zeros only
        (Spec("modelslim_v0_static", intermediate=500), Cut(3, pad=True)),
        (Spec("ct_static_asymmetric", intermediate=500), Cut(3, pad=True)),
        (Spec("fp8_block", intermediate=500), Cut(3, pad=True, weights="w8a8")),
    ],
)
def test_padded_and_cut_again(spec: Spec, cut: Cut, tmp_path: Path) -> None:
    source, shards = made(tmp_path, spec, cut)
    assert verify(shards, source).clean()
    again = split(shards, tmp_path / "again", Cut(2, "fused", pad=True))
    assert verify(again, shards).clean()
    assert verify(again, source).clean()


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ("modelslim_dynamic", "bf16"),
        ("modelslim_dynamic", "modelslim_static"),
        ("modelslim_static", "modelslim_mix"),
        ("modelslim_float", "modelslim_static"),
    ],
)
def test_mixed_layers(gate_up: str, down: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    float_linear = Recipe("bf16", {"weight": ("BF16", "out,in")}, "FLOAT")
    monkeypatch.setitem(RECIPES, "modelslim_float", float_linear)
    source, shards = made(tmp_path, Spec(gate_up, down_recipe=down), Cut(4))
    assert verify(shards, source).clean()


def test_another_folder_name_is_no_finding(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(), Cut(2))
    assert verify(shards, source.rename(tmp_path / "elsewhere")).clean()


class Counting(FolderSource):
    """A folder that notes the sizes of what is read of its tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sizes: list[int] = []

    def read_rows(self, out: Bytes, file: str, start: int, stride: int, once: bool = False) -> None:
        self.sizes.append(out.nbytes)
        super().read_rows(out, file, start, stride, once)


@pytest.mark.parametrize("recipe", ["bf16", "ct_dynamic"])
def test_a_byte_is_read_once_for_the_comparison_and_the_computation(tmp_path: Path, recipe: str) -> None:
    """But for scales: once for each."""
    source, shards = made(tmp_path, Spec(recipe), Cut(2))
    with Counting(source) as original, Counting(shards) as cut:
        manifest, checkpoint = parse_manifest((shards / MANIFEST).read_bytes()), describe(original)
        findings, layers = compare_with_source(cut, manifest, original, checkpoint)
        assert (findings, len(layers)) == ([], len(checkpoint.layers))
        held = [tensor for shard in manifest.shards for tensor in shard.tensors]
        for folder, tensors in ((original, [*checkpoint.tensors()]), (cut, held)):
            scales = [tensor for tensor in tensors if not tensor.name.endswith(".weight")]
            assert sum(folder.sizes) == sum(nbytes(t.dtype, t.shape) for t in (*tensors, *scales))


# A model's checkpoint and the same model quantized by other tools: the arithmetic means what the tools meant.
@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        ("tiny-bf16", "llmcompressor-fp8_block", 0.06),
        ("tiny-bf16", "llmcompressor-w8a8", 0.03),
        ("msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_mla_static_mlp_dynamic", 0.001),
        ("msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_static", 0.15),
    ],
)
def test_quantized_layers_compute_what_the_model_does(one: str, other: str, error: float) -> None:
    x_HT = np.random.default_rng(1).standard_normal((256, 8))

    def outputs(name: str) -> list[np.ndarray]:
        source = open_source(str(CHECKPOINTS / name))
        found = []
        for layer in describe(source).layers:
            assert layer.activation == Activation(SILU)
            linears = {role: stored_linear(source, linear) for role, linear in layer.linears.items()}
            found.append(unsplit_layer(linears, layer.activation, x_HT))
        return found

    for first, second in zip(outputs(one), outputs(other), strict=True):
        assert np.linalg.norm(first - second) < error * np.linalg.norm(first)


@pytest.mark.parametrize(
    "recipe",
    ["bf16", "ct_dynamic", "modelslim_static", "modelslim_fp16_static", "modelslim_mix", "ct_static_asymmetric"],
)
def test_without_quantizing_tokens_it_is_the_float64_layer(tmp_path: Path, recipe: str) -> None:
    """Tokens as they are, weights as they are stored; the demo's and the tests' reference of what ranks compute."""
    build(tmp_path / "model", Spec(recipe, 256, 1024, computable=True))
    layer = whole_layer(tmp_path / "model")
    x_TH = np.random.default_rng(0).standard_normal((3, 256))

    def weight(tensors: dict[str, torch.Tensor]) -> np.ndarray:
        stored = tensors["weight"].double().numpy()
        if recipe == "bf16":
            return stored
        if "weight_scale" in tensors:
            return stored * tensors["weight_scale"].double().numpy().reshape(-1, 1)
        scale = tensors["deq_scale"]
        numbers = scale.numpy().astype(np.int32).view(np.float32) if scale.dtype == torch.int64 else scale.numpy()
        return stored * (numbers.astype(np.float64) / tensors["input_scale"].double().numpy())[:, None]

    gate, up = np.split(x_TH @ weight(dict(layer.gate_up.tensors)).T, 2, axis=1)
    wanted = (gate / (1 + np.exp(-gate)) * up) @ weight(dict(layer.down.tensors)).T
    np.testing.assert_allclose(
        exact(tmp_path / "model", torch.from_numpy(x_TH)).numpy(), wanted, rtol=1e-12, atol=1e-12
    )


def test_its_own_path() -> None:
    """Neither the plan nor anything that writes shards, nor torch, is part of the proof."""
    code = "import sys, reshard.verification.source, reshard.verification.compute; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {
        "reshard.plan.plan",
        "reshard.tensors.byte_grid",
        "reshard.plan.manifest_builder",
        "reshard.convert.compute",
        "torch",
    } & set(modules)
