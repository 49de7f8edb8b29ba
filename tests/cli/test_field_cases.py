"""What `check`, `split` and `verify` make of checkpoints as people have them (`data/field`, `tests/support/field.py`).

A case is cut, with the scheme, layers and prefix that are right for it and warnings that say what was not as it should
be, or it is refused in one line that has the words that help. Cases that are no folder are tested below by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import field
from tests.support.advice import foreign_options
from tests.support.running import reshard

SNAPSHOT = "models--org--name/snapshots/0123abcd"
ROOTS = {
    "e04-hf-cache-snapshot": SNAPSHOT,
    "e05-hf-cache-blobs-linked": SNAPSHOT,
    "e06-shards-linked-from-two-disks": "model",
    "h07-hf-cache-blob-gone": SNAPSHOT,
    "h08-hf-cache-root": SNAPSHOT.partition("/")[0],
}


@dataclass(frozen=True)
class Cut:
    """`warns`: words of the warnings, all of them; no warning where there are none."""

    scheme: str
    layers: tuple[int, ...]
    warns: tuple[str, ...] = ()
    prefix: str = "model."
    activation: tuple[str, float | None] | None = ("silu", None)
    fused: str = ""  # why it needs --layout separate


@dataclass(frozen=True)
class Refused:
    """`check`: the check that fails; `says`: words of its line."""

    check: str
    says: tuple[str, ...]


WRAPPED, GLM, VL2 = "language_model.model.", "model.language_model.", "language.model."
SECOND = "model-00002-of-00003.safetensors"
ALONE = "taken from names alone"
DIFFERENT_SCALES = (
    "gate_proj.weight_scale is 0.0060416325, model.layers.0.mlp.up_proj.weight_scale is 0.00864976738; the fused "
    "layout holds one for both: use --layout separate"
)
EXPECTED: dict[str, Cut | Refused] = {
    "a01-kimi-k25-int4": Cut("bf16", (0,), prefix=WRAPPED),
    "a02-kimi-k25-modelslim": Cut("w8a8_dynamic", (0,), prefix=WRAPPED),
    "a04-qwen35-27b": Cut("bf16", (0, 1), prefix=GLM),
    "a06-llama4-maverick": Refused("layers", ("feed_forward", "Llama 4")),
    "a07-mistral3-consolidated": Cut("bf16", (0, 1), prefix=WRAPPED),
    "a08-deepseek-ocr": Cut("bf16", (0,)),
    "a09-deepseek-vl2": Cut("bf16", (0,), prefix=VL2),
    "a11-kimi-k3": Cut("bf16", (0,), ("its activation is situ", "not computed"), WRAPPED, ("situ", None)),
    "b01-phi3-fused": Cut("bf16", (0, 1)),
    "b03-deepseek-demo-mp": Refused("input", ("already cut per rank", "convert.py")),
    "b05-ernie-paddle": Refused("scheme", ("up_gate_proj", "PaddlePaddle")),
    "b06-qwen3-embedding": Cut("bf16", (0, 1), prefix=""),
    "b07-mistral-large3-native": Refused(
        "layers", ("layers.0.feed_forward.w1.weight", "Mistral's and Meta's own names")
    ),
    "c01-nvfp4-hf-quant-config": Refused("scheme", ("NVFP4", "hf_quant_config.json")),
    "c02-nvfp4-modelopt-config": Cut("bf16", (0,)),
    "c03-modelopt-fp8-tensor": Cut("fp8_tensor", (0,), fused=DIFFERENT_SCALES),
    "c05-awq-dense": Refused("scheme", ("awq", "BF16 or FP8 original")),
    "c06-gptq": Refused("scheme", ("gptq", "BF16 or FP8 original")),
    "c07-k2-thinking": Cut("bf16", (0,)),
    "c08-meituan-channel-int8": Cut("w8a8_dynamic", (0,)),
    "c09-meituan-block-int8": Cut("int8_block", (0,)),
    "c10-modelslim-mxfp8": Cut("w8a8_mxfp8", (0,)),
    "c11-modelslim-w4a8-dense-w8a8": Cut("w8a8_dynamic", (0,)),
    "c12-description-weights-only": Cut("w8a8_dynamic", (0,)),
    "c14-modelslim-nonfusion-smooth": Refused("scheme", ("down_proj.linear.weight", "smoothing", "1/R")),
    "c15-modelslim-kronecker": Refused("scheme", ("kronecker_rotation", "online transform", "1/R")),
    "c16-w8a8-description-lost": Refused("scheme", ("quant_model_description.json", "--scheme w8a8_dynamic")),
    "c17-mindie-format": Cut("w8a8_dynamic", (0,), ("fp8_block", "quant_model_description_w8a8_dynamic.json")),
    "c19-quark-mxfp4": Cut("bf16", (0,)),
    "c20-ct-transform-r4": Refused("scheme", ("down_proj", "transform_config", "R4", "1/R")),
    "c21-ct-two-groups-nvfp4-fp8": Cut("fp8_block", (0,)),
    "c23-fbgemm-fp8": Refused("scheme", ("fbgemm_fp8",)),
    "c25-v31-ue8m0-f32": Cut("fp8_block", (0,)),
    "c26-modelslim-per-group": Refused("scheme", ("groups of 32", "group_size 0")),
    "c27-modelslim-wfp8afp8": Refused("scheme", ("WFP8AFP8_DYNAMIC",)),
    "c28-auto-round": Cut("bf16", (0,)),
    "c30-fp8-config-stripped": Refused("scheme", ("quantization_config", "weight_block_size", "--scheme fp8_block")),
    "c32-fp8-static": Cut("fp8_tensor", (0,), fused=DIFFERENT_SCALES),
    "c33-qat-amax": Refused("scheme", ("input_quantizer._amax", "ModelOpt", "export_hf_checkpoint")),
    "c36-compression-config": Cut("w8a8_dynamic", (0,)),
    "c37-glm45-fp8": Cut("fp8_channel", (0, 1, 2)),
    "c38-nvfp4-stale-fp8-config": Refused("scheme", ("config.json", "fp8_block", "hf_quant_config.json", "NVFP4")),
    "c39-meituan-no-quantization-config": Cut("w8a8_dynamic", (0,), ("fit w8a8_dynamic alone", "--scheme")),
    "c40-modelarts-with-description": Cut("w8a8_dynamic", (0,)),
    "c41-modelarts-without-description": Refused("scheme", ("quant_model_description.json is missing", "--scheme")),
    "c42-w4afp8-hf-quant-config": Refused("scheme", ("hf_quant_config.json", "MIXED_PRECISION", "--scheme fp8_block")),
    "d01-ernie45-moe": Cut("bf16", (0,)),
    "d02-openpangu-ultra-moe": Cut("bf16", (0, 1, 2)),
    "d04-hunyuan-one-expert": Cut("bf16", (0, 1)),
    "d06-mimo-v2-flash": Cut("fp8_block", (0,)),
    "d07-glm5-fp8": Cut("fp8_block", (0, 1, 2)),
    "d09-ling-1t": Cut("bf16", (0, 1)),
    "d10-dots1": Cut("bf16", (0,)),
    "d11-null-first-k": Refused("layers", ("first_k_dense_replace",)),
    "d13-v4-transformers5": Refused("layers", ("no dense layer", "hash_moe")),
    "d14-v4-native": Refused("layers", ("no dense layer", "DeepSeek's own names")),
    "d15-truncated-config": Cut("bf16", (0, 1, 2)),
    "d16-truncated-below": Refused("layers", ("num_hidden_layers",)),
    "d18-duplicate-key": Refused("input", ("config.json", "duplicate key 'num_nextn_predict_layers'", "keep one")),
    "d20-hy3": Cut("bf16", (0,)),
    "d22-no-config": Cut("bf16", (0,), ("no config.json", ALONE), activation=None),
    "d23-no-config-dense-mtp": Cut("bf16", (0, 1, 2), ("no config.json", ALONE, "MTP layer"), activation=None),
    "e01-index-total-size": Cut("bf16", (0,)),
    "e02-index-no-metadata": Cut("bf16", (0,)),
    "e03-index-dot-slash": Cut("bf16", (0,)),
    "e04-hf-cache-snapshot": Cut("bf16", (0,)),
    "e05-hf-cache-blobs-linked": Cut("bf16", (0,)),
    "e06-shards-linked-from-two-disks": Cut("bf16", (0,)),
    "e07-lfs-pointer-all": Refused("input", ("Git LFS pointer", "git lfs pull")),
    "e08-lfs-pointer-config": Refused("input", ("model.safetensors.index.json", "Git LFS pointer", "git lfs pull")),
    "e09-consolidated-no-index": Cut("bf16", (0, 1), ("consolidated.safetensors",)),
    "e10-original-subfolder": Cut("bf16", (0,)),
    "e11-bin-only": Refused("input", (".bin", "save_pretrained")),
    "e12-gguf-only": Refused("input", ("GGUF",)),
    "e13-single-and-sharded-index": Refused("input", ("model.safetensors", "transformers", "vLLM", "--index")),
    "e14-single-and-sharded-noindex": Refused(
        "input", ("model.safetensors", "-of-00002.safetensors", "transformers takes", "vLLM takes", "--index")
    ),
    "e15-missing-expert-shard": Cut(
        "bf16", (0,), ("model-00002-of-00002.safetensors", "not there", "37 tensors, none of a dense layer")
    ),
    "e16-index-names-dropped-mtp": Cut("bf16", (0,), ("model.safetensors.index.json", "no file holds")),
    "e17-index-scale-inv-kept": Cut("bf16", (0,), ("weight_scale_inv",)),
    "e18-lora-beside": Cut("bf16", (0,), ("adapter_model.safetensors", "LoRA")),
    "e19-lora-in-file": Refused("layers", ("LoRA adapter that is not merged",)),
    "e20-eagle-draft-beside": Refused("input", ("draft.safetensors", "model.safetensors")),
    "e21-eagle-layer-beside": Refused("input", ("draft.safetensors", "--index model.safetensors")),
    "e22-trailing-bytes": Refused("input", ("16 bytes after the last tensor",)),
    "e23-truncated": Refused("input", ("cut short",)),
    "e24-html-instead": Refused("input", ("HTML",)),
    "e25-inv-freq-extra": Cut("bf16", (0,)),
    "e26-modelscope-cache": Cut("bf16", (0,)),
    "e27-aria2-part": Refused("input", ("zeros", "download is not finished")),
    "e28-two-descriptions": Cut("w8a8_dynamic", (0,)),
    "e29-rank-folders": Refused("input", ("rank_0", "rank_1")),
    "e30-merged-into-model": Cut("bf16", (0,)),
    "e31-mixed-case-config-dir": Cut("bf16", (0,), prefix=WRAPPED),
    "e32-f8-e5m2": Refused("scheme", ("E5M2",)),
    "g01-glm53-swiglu-limit": Cut("bf16", (0, 1, 2), activation=("silu", 10.0)),
    "g03-ct-quip-online-transform": Refused("scheme", ("transform_config", "online transform")),
    "h01-partial-no-index": Refused("input", (f"{SECOND} is missing", "dense, and of these the other files hold 0")),
    "h02-partial-no-index-family-not-known": Refused("input", (f"{SECOND} is missing", "minicpm", "or the index")),
    "h03-partial-no-index-no-config": Refused("input", (f"{SECOND} is missing", "no config.json says which")),
    "h04-partial-no-index-keys-not-known": Refused("input", (f"{SECOND} is missing", "moe_start")),
    "h05-partial-no-index-experts-missing": Cut("bf16", (0, 1), ("model-00003-of-00003.safetensors is missing",)),
    "h06-partial-no-index-linear-missing": Refused("input", ("model-00002-of-00002.safetensors is missing",)),
    "h07-hf-cache-blob-gone": Refused("input", ("model.safetensors is a link to ../../blobs/h1 (", "is not there")),
    "h08-hf-cache-root": Refused("input", ("Hugging Face cache", "give snapshots/0123abcd")),
    "h09-link-to-itself": Refused("input", ("model.safetensors is a link to model.safetensors", "back to itself")),
    "h10-modelscope-temp": Refused("input", ("._____temp", "unfinished downloads", "let them finish")),
    "h11-json-error-instead": Refused("input", ("an answer of a server", "Access to model org/name is restricted")),
    "h12-xet-pointer": Refused("input", ("a Git Xet pointer",)),
    "h13-config-link-gone": Refused("input", ("config.json is a link to ../blobs/gone (", "is not there")),
    "h14-description-link-gone": Refused("input", ("quant_model_description.json is a link to ../blobs/gone (",)),
    "h15-stale-scale-of-a-file-that-is-gone": Cut("bf16", (0, 1), ("still names scales of a dense layer",)),
    "h16-two-live-indexes": Refused("input", ("two indexes", "transformers and vLLM both take", "--index quant_")),
    "h17-transformers-weights": Refused("input", ("transformers_weights names tuned.safetensors", "--index tuned")),
}
BY_NAME = {
    "c31-v2-lite-fp8-offgrid",
    "d19-config-no-dtype",
    "f01-mlp-tp-over-dp",
    "f04-mlp-tp-top-level",
    "g04-stale-single-file",
}


def build(name: str, tmp_path: Path) -> Path:
    return field.build(name, tmp_path / "in") / ROOTS.get(name, "")


def of(name: str, kind: type) -> bool:
    return isinstance(EXPECTED[name], kind)


def test_every_case_has_an_expectation() -> None:
    assert EXPECTED.keys() | BY_NAME == field.CASES.keys()
    assert not EXPECTED.keys() & BY_NAME


@pytest.mark.parametrize("name", [name for name in EXPECTED if of(name, Cut)])
def test_it_is_cut(tmp_path: Path, name: str) -> None:
    folder, expected = build(name, tmp_path), EXPECTED[name]
    assert isinstance(expected, Cut)
    done = reshard("check", folder, "--tp", 4, "--format", "json")
    findings = [f for target in done.document["targets"] for f in target["findings"]]
    assert done.code == 0, findings
    warned = " ".join(f["message"] for f in findings if f["severity"] == "warning")
    assert [word for word in expected.warns if word not in warned] == [], warned
    assert bool(warned) == bool(expected.warns), warned
    if expected.fused:
        done = reshard("split", folder, tmp_path / "out", "--tp", 4, "--quiet")
        assert done.code == 1
        assert expected.fused in done.err
    layout = "separate" if expected.fused else "fused"
    done = reshard("split", folder, tmp_path / "out", "--tp", 4, "--layout", layout, "--quiet")
    assert done.code == 0, done.err
    assert [word for word in expected.warns if word not in done.err] == [], done.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["scheme"] == expected.scheme
    assert tuple(layer["index"] for layer in manifest["layers"]) == expected.layers
    assert manifest["model"]["prefix"] == expected.prefix
    activations = {tuple(layer["activation"].values()) if layer["activation"] else None for layer in manifest["layers"]}
    assert activations == {expected.activation}
    done = reshard("verify", tmp_path / "out", "--source", folder, "--format", "json")
    assert done.code == 0, done.document
    computed = expected.activation is not None and expected.activation[0] != "situ"
    assert len(done.document["layers"]) == (len(expected.layers) if computed else 0)


@pytest.mark.parametrize("name", [name for name in EXPECTED if of(name, Refused)])
def test_it_is_refused_in_words_that_help(tmp_path: Path, name: str) -> None:
    folder, expected = build(name, tmp_path), EXPECTED[name]
    assert isinstance(expected, Refused)
    done = reshard("check", folder, "--tp", 4, "--format", "json")
    wrong = [f for target in done.document["targets"] for f in target["findings"] if f["severity"] == "error"]
    assert [f["check"] for f in wrong] == [expected.check]
    assert done.code == (1 if expected.check == "input" else 3)
    assert [word for word in expected.says if word not in wrong[0]["message"]] == [], wrong[0]["message"]
    done = reshard("split", folder, tmp_path / "out", "--tp", 4, "--quiet")
    assert done.code == 1
    assert [word for word in expected.says if word not in done.err] == [], done.err
    assert len(done.err.strip().splitlines()) == 1
    for command in ("check", "split", "inspect", "estimate"):
        assert foreign_options(command, done.err) == []
    for bad in ("stale; remove", "remove the one", "download it again", "download both", "is the file of this"):
        assert bad not in done.err
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_fit_can_be_padded_or_made_bf16(tmp_path: Path) -> None:
    folder = build("c31-v2-lite-fp8-offgrid", tmp_path)
    done = reshard("split", folder, tmp_path / "out", "--tp", 2)
    assert done.code == 1
    assert "--pad" in done.err
    assert "--weights bf16" in done.err
    for number, options in enumerate((("--pad",), ("--weights", "bf16"))):
        out = tmp_path / f"out{number}"
        assert reshard("split", folder, out, "--tp", 2, *options).code == 0
        assert reshard("verify", out, "--source", folder).code == 0


@pytest.mark.parametrize("name", ["dtype", "none", "torch"])
def test_a_config_with_or_without_a_dtype(tmp_path: Path, name: str) -> None:
    folder = build("d19-config-no-dtype", tmp_path)
    done = reshard("check", "--config", folder / f"{name}.json", "--tp", 4, "--format", "json")
    assert done.code == 0
    (scheme,) = [f for f in done.document["targets"][0]["findings"] if f["check"] == "scheme"]
    assert "bf16 (weight " in scheme["message"]


def test_a_config_alone_of_a_family_with_keys_of_its_own(tmp_path: Path) -> None:
    folder = build("d02-openpangu-ultra-moe", tmp_path)
    option = ("--data-parallel-size", 8, "--additional-config", '{"denseffn_tensor_parallel_size": 4}')
    done = reshard("check", "--config", folder / "config.json", "--tp", 4, *option, "--format", "json")
    assert done.code == 0, done.document
    (layers,) = [f for f in done.document["targets"][0]["findings"] if f["check"] == "layers"]
    assert "3 dense layers (0-2)" in layers["message"]


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("f01-mlp-tp-over-dp", 4, ("finegrained_tp_config.mlp_tensor_parallel_size is 8", "data-parallel size 4")),
        ("f04-mlp-tp-top-level", 16, ("mlp_tensor_parallel_size", "finegrained_tp_config")),
    ],
)
def test_vllm_ascends_own_option(tmp_path: Path, name: str, size: int, says: tuple[str, ...]) -> None:
    folder, out = build(name, tmp_path), tmp_path / "out"
    assert reshard("split", folder, out, "--tp", 8).code == 0
    nested = {"finegrained_tp_config": {"mlp_tensor_parallel_size": 8}}
    config = json.dumps(nested if name.startswith("f01") else nested["finegrained_tp_config"])
    done = reshard("check", out, "--data-parallel-size", size, "--additional-config", config, "--format", "json")
    wrong = [f["message"] for f in done.document["targets"][0]["findings"] if f["severity"] == "error"]
    assert done.code == 3
    assert [word for word in says if word not in wrong[0]] == [], wrong
