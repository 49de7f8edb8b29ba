"""Quantised checkpoints from the field: what is cut and as what, what is refused and in which words."""

from pathlib import Path

import pytest

from reshard.errors import ReshardError
from reshard.record import scheme_name
from reshard.source.open import describe, open_source
from tests import field
from tests.running import reshard

CUT = {
    "a01-kimi-k25-int4": "bf16",
    "a02-kimi-k25-modelslim": "w8a8_dynamic",
    "c02-nvfp4-modelopt-config": "bf16",
    "c07-k2-thinking": "bf16",
    "c08-meituan-channel-int8": "w8a8_dynamic",
    "c09-meituan-block-int8": "int8_block",
    "c11-modelslim-w4a8-dense-w8a8": "w8a8_dynamic",
    "c12-description-weights-only": "w8a8_dynamic",
    "c19-quark-mxfp4": "bf16",
    "c21-ct-two-groups-nvfp4-fp8": "fp8_block",
    "c25-v31-ue8m0-f32": "fp8_block",
    "c28-auto-round": "bf16",
    "c31-v2-lite-fp8-offgrid": "fp8_block",
    "c36-compression-config": "w8a8_dynamic",
    "c37-glm45-fp8": "fp8_channel",
    "c40-modelarts-with-description": "w8a8_dynamic",
}
"""Without a word."""

WARNED = {
    "c17-mindie-format": (
        "w8a8_dynamic",
        "config.json (quant_method fp8) says fp8_block",
        "quant_model_description_w8a8_dynamic.json (W8A8_DYNAMIC) says w8a8_dynamic, which the tensors are",
    ),
    "c39-meituan-no-quantization-config": (
        "w8a8_dynamic",
        "nothing beside the files says what the weights are",
        "weight I8, weight_scale F32",
        "fit w8a8_dynamic alone",
        "--scheme w8a8_dynamic",
    ),
    "e28-two-descriptions": (
        "w8a8_dynamic",
        "quant_model_description_w8a8_dynamic.json is not read: quant_model_description.json is what vllm-ascend reads",
    ),
}

REFUSED = {
    "c01-nvfp4-hf-quant-config": (
        "hf_quant_config.json (quant_algo NVFP4) says NVFP4",
        "does not split",
        "BF16 or FP8",
    ),
    "c03-modelopt-fp8-tensor": ("hf_quant_config.json (quant_algo FP8) says FP8 with one scale per tensor",),
    "c05-awq-dense": ("config.json (quant_method awq) says awq", "BF16 or FP8 original"),
    "c06-gptq": ("config.json (quant_method gptq) says gptq",),
    "c10-modelslim-mxfp8": ("quant_model_description.json (W8A8_MXFP8) says W8A8_MXFP8", "BF16 or FP8 original"),
    "c14-modelslim-nonfusion-smooth": ("down_proj.linear.weight: smoothing that is not fused", "online transform"),
    "c15-modelslim-kronecker": ("layers.0.mlp", "kronecker_rotation", "1/R of the intermediate features"),
    "c16-w8a8-description-lost": (
        "no quant_model_description.json",
        "put it beside the files",
        "--scheme w8a8_dynamic",
    ),
    "c20-ct-transform-r4": ("down_proj: config.json: quantization_config.transform_config", "R4 at its input"),
    "c23-fbgemm-fp8": ("config.json (quant_method fbgemm_fp8) says fbgemm_fp8",),
    "c26-modelslim-per-group": ("weight_scale", "[256, 2]", "groups of 32 along in", "quantise per channel"),
    "c27-modelslim-wfp8afp8": ("says WFP8AFP8_DYNAMIC",),
    "c30-fp8-config-stripped": (
        "weight_scale_inv F32 [4, 1]",
        "no quantization_config in config.json",
        '"weight_block_size": [128, 128]',
        "--scheme fp8_block",
    ),
    "c32-fp8-static": ("FP8 with one scale per tensor (no weight_block_size)",),
    "c33-qat-amax": ("gate_proj.input_quantizer._amax", "ModelOpt's simulated quantization"),
    "c38-nvfp4-stale-fp8-config": (
        "config.json (quant_method fp8) says fp8_block",
        "hf_quant_config.json (quant_algo NVFP4) says NVFP4",
        "are NVFP4, as hf_quant_config.json says",
    ),
    "c41-modelarts-without-description": ("ModelSlim's, whose quant_model_description.json is missing",),
    "c42-w4afp8-hf-quant-config": ("hf_quant_config.json says MIXED_PRECISION", "are fp8_block", "--scheme fp8_block"),
    "e32-f8-e5m2": ("config.json (quant_method fp8) says FP8 E5M2",),
    "g03-ct-quip-online-transform": ("gate_proj: config.json: quantization_config.transform_config", "v at its input"),
}

TOLD = {
    "c16-w8a8-description-lost": "w8a8_dynamic",
    "c30-fp8-config-stripped": "fp8_block",
    "c39-meituan-no-quantization-config": "w8a8_dynamic",
    "c41-modelarts-without-description": "w8a8_dynamic",
    "c42-w4afp8-hf-quant-config": "fp8_block",
}
"""What --scheme opens."""


@pytest.mark.parametrize("name", CUT)
def test_cut(name: str, tmp_path: Path) -> None:
    with open_source(str(field.build(name, tmp_path / "model"))) as source:
        checkpoint = describe(source)
    assert (scheme_name(checkpoint.layers), checkpoint.warnings) == (CUT[name], ())


@pytest.mark.parametrize("name", WARNED)
def test_cut_with_a_warning(name: str, tmp_path: Path) -> None:
    scheme, *says = WARNED[name]
    with open_source(str(field.build(name, tmp_path / "model"))) as source:
        checkpoint = describe(source)
    assert scheme_name(checkpoint.layers) == scheme
    (line,) = checkpoint.warnings
    assert [part for part in says if part not in line] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    folder = field.build(name, tmp_path / "model")
    with open_source(str(folder)) as source, pytest.raises(ReshardError) as caught:
        describe(source)
    assert [part for part in REFUSED[name] if part not in str(caught.value)] == [], caught.value
    assert "download" not in str(caught.value)
    assert reshard("check", folder, "--tp", 2).code == 3


@pytest.mark.parametrize("name", TOLD)
def test_what_scheme_opens_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """Cut, verified against its source, checked, cut again and merged: the manifest keeps what was told."""
    source, told = field.build(name, tmp_path / "model"), ("--scheme", TOLD[name])
    done = reshard("split", source, tmp_path / "s", "--tp", 2, *told, "--quiet")
    assert done.code == 0, done.err
    assert reshard("verify", tmp_path / "s", "--source", source, *told, "--quiet").code == 0
    assert reshard("check", tmp_path / "s", "--tp", 2).code == 0
    assert reshard("split", tmp_path / "s", tmp_path / "again", "--tp", 1, "--quiet").code == 0
    assert reshard("merge", tmp_path / "s", tmp_path / "merged").code == 0
    for beside in ("config.json", "hf_quant_config.json"):
        if (source / beside).exists():
            assert (tmp_path / "s" / beside).read_bytes() == (source / beside).read_bytes()
    done = reshard("split", tmp_path / "s", tmp_path / "told", "--tp", 1, *told)
    assert done.code == 2
    assert "is a shard set, whose manifest.json says it" in done.err


def test_every_quantised_case_of_the_field_is_here() -> None:
    assert {name for name in field.CASES if name.startswith("c")} <= CUT.keys() | WARNED.keys() | REFUSED.keys()
