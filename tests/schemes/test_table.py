"""Every row of the table of schemes by every command, and values against plain torch."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from reshard.convert import Weights
from reshard.errors import ReshardError
from reshard.plan.pipeline import Cut
from reshard.schemes.table import SCHEMES, VARIANTS, Variant
from reshard.synth.schemes import RECIPES
from tests.support.builders import Raw, Spec, build, dense_only, read_folder, read_safetensors, write_safetensors
from tests.support.manifests import edit_manifest
from tests.support.paths import CONFIGS
from tests.support.running import Done, reshard, split

torch = pytest.importorskip("torch")

from reshard_runtime import DenseFFN, load_shard  # noqa: E402
from reshard_runtime.dequantize import scale_values  # noqa: E402

HIDDEN, INTERMEDIATE = 256, 512
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1}
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.float8_e8m0fnu, "I8": torch.int8,
}  # fmt: skip


def done(*arguments: object) -> Done:
    found = reshard(*arguments)
    assert found.code == 0, found.err
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama's config.json."""
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text()) | SIZES
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_command_takes_every_row(tmp_path: Path, model: Path, name: str, layout: str) -> None:
    scheme = SCHEMES[RECIPES[name].variant.scheme]
    source, shards = tmp_path / "source", tmp_path / "shards"
    done("synth", model, source, "--scheme", name, "--dense-only", "--quiet")
    inspected = done("inspect", source, "--format", "json").document
    assert {part["scheme"] for layer in inspected["layers"] for part in layer["linears"].values()} == {scheme.name}
    done("split", source, shards, "--tp", 2, "--layout", layout, "--quiet")
    verified = done("verify", shards, "--source", source, "--format", "json").document
    assert len(verified["layers"]) == 1
    done("merge", shards, tmp_path / "merged", "--quiet")
    assert read_folder(tmp_path / "merged") == dense_only(read_folder(source))
    checked = reshard("check", source, "--tp", 2, "--device", "npu", "--format", "json").document
    (kernels,) = (f for t in checked["targets"] for f in t["findings"] if f["check"] == "kernels")
    assert kernels["severity"] == ("ok" if "npu" in scheme.native else "warning")
    assert scheme.name in kernels["message"]
    if RECIPES[name].floating != "F32":  # of which no device profile has a rate
        (estimated,) = done("estimate", source, "--tp", 2, "--format", "json").document["schemes"]
        assert estimated["scheme"] == scheme.name
    layer = load_shard(shards, 1).layer(0)
    y_TH = DenseFFN(load_shard(_whole(source, tmp_path), 0).layer(0))(torch.ones(3, HIDDEN, dtype=layer_dtype(layer)))
    assert y_TH.shape == (3, HIDDEN)
    assert y_TH.isfinite().all()
    for option in {"bf16", "w8a8"} if scheme.becomes else ():
        done("split", source, tmp_path / option, "--tp", 2, "--weights", option, "--quiet")
        done("verify", tmp_path / option, "--source", source)


def _whole(source: Path, tmp_path: Path) -> Path:
    split(source, tmp_path / "whole", Cut(1))
    return tmp_path / "whole"


def layer_dtype(layer: Any) -> Any:
    dtype = layer.down.tensors["weight"].dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


def golden(tensors: dict[str, Raw], module: str) -> Any:
    """weight * scale as BF16, in plain torch."""
    weight, *scales = (_torch(tensors[f"{module}.{s}"]) for s in ("weight", "weight_scale", "weight_scale_inv")
                       if f"{module}.{s}" in tensors)  # fmt: skip
    (scale,) = (one.float() for one in scales)
    if scale.numel() > 1:
        extents = [-(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True)]
        scale = scale.repeat_interleave(extents[0], 0).repeat_interleave(extents[1], 1)
    return (weight.float() * scale).bfloat16()


def _torch(raw: Raw) -> Any:
    dtype, shape, data = raw
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


SCALED = ["fp8_block", "fp8_block_ue8m0", "ct_fp8_block", "ct_fp8_channel", "fp8_tensor", "fp8_tensor_static",
          "ct_fp8_tensor", "modelslim_mxfp8", "int8_block"]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", SCALED)
def test_what_is_loaded_is_weight_times_scale(tmp_path: Path, recipe: str, layout: str, size: int) -> None:
    tensors = build(tmp_path / "model", Spec(recipe, HIDDEN, INTERMEDIATE, dense=1))
    split(tmp_path / "model", tmp_path / "shards", Cut(size, layout))
    check_loaded(tmp_path / "shards", tensors, size)


def check_loaded(shards: Path, tensors: dict[str, Raw], size: int) -> None:
    gate, up, down = (golden(tensors, f"model.layers.0.mlp.{role}_proj") for role in ("gate", "up", "down"))
    for rank in range(size):
        layer = load_shard(shards, rank).layer(0)
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        assert torch.equal(layer.gate_up.tensors["weight"], expected)
        assert torch.equal(layer.down.tensors["weight"], down.chunk(size, dim=1)[rank])


@pytest.mark.parametrize("recipe", ["fp8_tensor", "fp8_tensor_static"])
def test_gate_and_up_may_have_scales_of_their_own_where_they_lie_apart(tmp_path: Path, recipe: str) -> None:
    """In the fused layout one value stands for both."""
    source = tmp_path / "model"
    build(source, Spec(recipe, HIDDEN, INTERMEDIATE, dense=1, files=1, index=False))
    (path,) = source.glob("*.safetensors")
    tensors = read_safetensors(path)
    for value, name in enumerate(n for n in sorted(tensors) if n.endswith("_scale") and "gate_proj" in n):
        for at, role in enumerate(("gate_proj", "up_proj")):
            data = np.float32(2.0 ** -(6 + value + at)).tobytes()
            tensors[name.replace("gate_proj", role)] = ("F32", (1,), data)
    write_safetensors(path, tensors)
    refused = reshard("split", source, tmp_path / "fused", "--tp", 2)
    assert refused.code == 1
    assert "up_proj.weight_scale is " in refused.err
    assert "gate_proj.weight_scale is " in refused.err
    assert "use --layout separate" in refused.err
    shards = tmp_path / "shards"
    done("split", source, shards, "--tp", 2, "--layout", "separate", "--quiet")
    check_loaded(shards, tensors, 2)
    assert len(done("verify", shards, "--source", source, "--format", "json").document["layers"]) == 1
    done("merge", shards, tmp_path / "merged", "--quiet")
    assert read_folder(tmp_path / "merged") == dense_only(tensors)


def test_every_exponent_is_what_torch_makes_of_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e8m0fnu).float()
    for stored in (codes, codes.view(torch.float8_e8m0fnu)):
        torch.testing.assert_close(scale_values(stored), expected, rtol=0, atol=0, equal_nan=True)


def _row(variant: Variant) -> str:
    return variant.name


@pytest.mark.parametrize("variant", VARIANTS, ids=_row)
def test_rows_fit_one_another(variant: Variant) -> None:
    assert variant.scheme in SCHEMES
    assert {other.scheme for other in VARIANTS if other.kind == variant.kind} == {variant.scheme}
    assert len({rule.operand for rule in variant.tensors}) == len(variant.tensors)
    assert set(SCHEMES[variant.scheme].becomes) <= set(SCHEMES)
    assert [other.name for other in VARIANTS].count(variant.name) == 1


def test_the_words_of_the_option_are_the_table_s() -> None:
    assert set(get_args(Weights)) == {"keep", *(scheme.option for scheme in SCHEMES.values() if scheme.option)}


def test_an_unknown_scheme_is_refused_everywhere_alike(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("bf16", HIDDEN, INTERMEDIATE, dense=1))
    shards = tmp_path / "shards"
    split(tmp_path / "model", shards, Cut(2))
    edit_manifest(shards, lambda m: m["layers"][0]["linears"]["down_proj"].update(scheme="w4a4"))
    says = f"unknown scheme w4a4; supported are {', '.join(SCHEMES)}"
    for command in (
        ("verify", shards), ("merge", shards, tmp_path / "merged"), ("split", shards, tmp_path / "again", "--tp", 1),
        ("check", shards, "--device", "npu"), ("estimate", shards, "--tp", 2), ("inspect", shards),
    ):  # fmt: skip
        found = reshard(*command)
        assert found.code in (1, 3), command
        assert says in found.out + found.err, command
    with pytest.raises(ReshardError, match="unknown scheme w4a4; supported are bf16, "):
        load_shard(shards, 0)
