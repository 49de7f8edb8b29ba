"""Accounts of a quantization against the tensors: which is taken, which is named as stale, what --scheme decides."""

from pathlib import Path
from typing import Any

import pytest

from reshard.errors import SchemeError
from reshard.quantization import DESCRIPTION, Accounts, Schemes, list_accounts, without_quantization
from reshard.schemes.match import StoredTensor
from reshard.source.open import describe, open_source
from tests.support.builders import Spec, build
from tests.support.linears import (
    BLOCKS,
    CHANNEL,
    DYNAMIC,
    FP4,
    FP8,
    INT8,
    INT8_BLOCKS,
    MODULE,
    OFFSETS,
    PLAIN,
    STATIC,
    STATIC_OF_BOTH,
    decided,
    described,
    of,
    refused,
    tensors,
)

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4}
SLIM = described("W8A8_DYNAMIC")
NVFP4 = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}


# Where it is said.


@pytest.mark.parametrize(
    "levels",
    [
        {"quantization_config": FP8},
        {"compression_config": FP8},
        {"quantization_config": None, "compression_config": FP8},
        {"text_config": {"num_hidden_layers": 2, "quantization_config": FP8}},
        {"quantization_config": FP8, "text_config": {"num_hidden_layers": 2}},
        {"quantization_config": FP8, "text_config": {"num_hidden_layers": 2, "quantization_config": FP8}},
        {"quantization_config": FP8, "compression_config": FP8},
    ],
    ids=str,
)
def test_the_places_in_a_config(levels: dict[str, Any]) -> None:
    (account,) = list_accounts(Accounts(levels))
    assert account.file == "config.json"
    assert decided(BLOCKS, Accounts(levels)) == ("fp8_block", (128, 128), [])
    assert list_accounts(Accounts(without_quantization(levels))) == ()


def test_a_compression_config_beside_it_comes_second() -> None:
    both = Accounts({"compression_config": INT8, "quantization_config": FP8})
    scheme, _, (line,) = decided(BLOCKS, both)
    assert scheme == "fp8_block"
    assert "says w8a8_dynamic, config.json (quant_method fp8) says fp8_block, which the tensors are" in line


SIZES = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({**SIZES, "language_config": {**SIZES, "quantization_config": FP8}}, "language_config"),
        ({**SIZES, "text_config": {"quantization_config": FP8}}, "text_config"),
        ({"thinker_config": {"quantization_config": FP8, "text_config": SIZES}}, "thinker_config"),
        ({"thinker_config": {"text_config": {**SIZES, "quantization_config": FP8}}}, "thinker_config.text_config"),
    ],
    ids=str,
)
def test_every_level_of_the_language_model_is_read(config: dict[str, Any], path: str) -> None:
    (account,) = list_accounts(Accounts(config))
    assert account.section is not None
    assert account.section.path == f"{path}.quantization_config"
    assert decided(BLOCKS, Accounts(config)) == ("fp8_block", (128, 128), [])


@pytest.mark.parametrize("section", [{}, {"quant_method": None}, None])
def test_a_section_that_says_nothing(section: object) -> None:
    assert list_accounts(of(section)) == ()
    assert decided(PLAIN, Accounts({"quantization_config": section})) == ("bf16", None, [])
    both = Accounts({"quantization_config": section, "compression_config": FP8})
    assert decided(BLOCKS, both) == ("fp8_block", (128, 128), [])


def two_blocks(second: list[int]) -> dict[str, Any]:
    return {"quantization_config": FP8, "text_config": {"quantization_config": FP8 | {"weight_block_size": second}}}


def test_blocks_that_differ_are_a_contradiction() -> None:
    scheme, block, (line,) = decided(BLOCKS, Accounts(two_blocks([128, 256])))
    assert (scheme, block) == ("fp8_block", (128, 128))
    assert (
        "config.json (text_config: quant_method fp8) says fp8_block in blocks of 128 x 256, config.json (quant_method "
        "fp8) says fp8_block in blocks of 128 x 128, which the tensors are"
    ) in line


@pytest.mark.parametrize("scheme", [None, "fp8_block"])
def test_two_blocks_that_both_fit_are_refused(scheme: str | None) -> None:
    small = {"weight": StoredTensor("F8_E4M3", (64, 64), "f"), "weight_scale_inv": StoredTensor("F32", (1, 1), "f")}
    line = refused(small, Accounts(two_blocks([128, 256]), scheme=scheme))
    assert "they fit both; make the two say what the weights are" in line
    assert "blocks of 128 x 256" in line


def test_the_order_of_files() -> None:
    files = [account.file for account in list_accounts(of(FP8, description=SLIM, modelopt=NVFP4))]
    assert files == [DESCRIPTION, "config.json", "hf_quant_config.json"]


@pytest.mark.parametrize(
    ("content", "found", "scheme"),
    [
        ({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}, CHANNEL, "fp8_channel"),
        ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, PLAIN, "bf16"),
        ({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.0*"]}}, PLAIN, "bf16"),
        ({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"x": {}}}}, PLAIN, "bf16"),
        ({"quant_algo": "NVFP4", "exclude_modules": ["*mlp.gate_proj"]}, PLAIN, "bf16"),
    ],
    ids=str,
)
def test_modelopt_s_own_file(content: dict[str, Any], found: dict[str, StoredTensor], scheme: str) -> None:
    assert decided(found, Accounts({}, modelopt=content)) == (scheme, None, [])


def test_modelopt_s_mixed_layers() -> None:
    mixed = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {MODULE: {"quant_algo": "NVFP4"}}}}
    assert "hf_quant_config.json (quant_algo NVFP4) says NVFP4" in refused(FP4, Accounts({}, modelopt=mixed))


# Two accounts.


@pytest.mark.parametrize(
    ("found", "accounts", "scheme"),
    [
        (OFFSETS, of(INT8, description=SLIM), "w8a8_dynamic"),
        (DYNAMIC, of(INT8), "w8a8_dynamic"),
        (PLAIN, of(AWQ | {"modules_to_not_convert": ["mlp"]}), "bf16"),
        (PLAIN, of({"quant_method": "quark", "exclude": [MODULE]}, modelopt={"quant_algo": None}), "bf16"),
    ],
)
def test_accounts_that_agree(found: dict[str, StoredTensor], accounts: Accounts, scheme: str) -> None:
    assert decided(found, accounts) == (scheme, None, [])


def test_the_first_fits_and_the_second_does_not() -> None:
    scheme, _, (line,) = decided(OFFSETS, of(FP8, description=SLIM))
    assert scheme == "w8a8_dynamic"
    assert line == (
        f"{MODULE}: config.json (quant_method fp8) says fp8_block, {DESCRIPTION} (W8A8_DYNAMIC) says w8a8_dynamic, "
        "which the tensors are: taken as w8a8_dynamic"
    )


def test_a_second_that_cannot_be_read_is_no_obstacle() -> None:
    scheme, _, (line,) = decided(OFFSETS, of(FP8 | {"modules_to_not_convert": 1}, description=SLIM))
    assert scheme == "w8a8_dynamic"
    assert "not read: config.json: quantization_config.modules_to_not_convert is not a list of names" in line


@pytest.mark.parametrize(
    ("found", "accounts", "says"),
    [
        (BLOCKS, of(FP8, description=SLIM), (f"{DESCRIPTION} is not of these weights", "--scheme fp8_block")),
        (
            FP4,
            of(FP8, modelopt=NVFP4),
            ("are NVFP4, as hf_quant_config.json (quant_algo NVFP4) says", "this version does not split it"),
        ),
        (FP4, of(FP8), ("says fp8_block, and its tensors (", "are NVFP4; this version does not split it")),
        (PLAIN, of(FP8, modelopt={"quant_algo": None}), ("are plain BF16, as hf_quant_config.json", "--scheme bf16")),
        (CHANNEL, of(FP8), ("are fp8_channel", "config.json is not of these weights", "--scheme fp8_channel")),
        (
            BLOCKS,
            of(FP8 | {"ignored_layers": [MODULE]}),
            ("quantization_config.ignored_layers) says bf16", "fp8_block"),
        ),
        (
            tensors(weight="BF16", weight_scale="BF16 out,1"),
            of(INT8),
            ("says w8a8_dynamic", "are fake-quantized (float weights beside their scales: not compressed yet)"),
        ),
        (OFFSETS, of(INT8), (f"ModelSlim's, whose {DESCRIPTION} is missing", "--scheme w8a8_dynamic")),
        (STATIC, of(description=SLIM), ("says w8a8_dynamic", "are w8a8_static", "--scheme w8a8_static")),
    ],
)
def test_both_sides_are_named(found: dict[str, StoredTensor], accounts: Accounts, says: tuple[str, ...]) -> None:
    line = refused(found, accounts)
    assert [part for part in says if part not in line] == [], line


@pytest.mark.parametrize("quantization", [FP8, INT8, AWQ])
def test_plain_weights_beside_a_quantized_config(quantization: dict[str, Any]) -> None:
    line = refused(PLAIN, of(quantization))
    assert f"plain BF16 with no scales ({MODULE}.weight in model.safetensors); weights that were cast" in line
    assert "remove quantization_config from config.json" in line
    assert "--scheme bf16" in line
    scheme, _, (warning,) = decided(PLAIN, of(quantization, scheme="bf16"))
    assert scheme == "bf16"
    assert "--scheme says bf16, which the tensors are: taken as bf16; an engine goes by the file" in warning


@pytest.mark.parametrize(
    "rest",
    [
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
        "model.layers.1.mlp.gate_proj.weight_scale",
        "model.layers.1.mlp.experts.gate_up_proj_blocks",
        "model.layers.1.mlp.experts.0.up_proj.qweight",
        "model.layers.1.mlp.experts.0.up_proj.weight_packed",
        "model.layers.1.self_attn.q_proj.weight.absmax",
        "model.layers.1.self_attn.q_proj.weight._data",
    ],
)
def test_what_says_that_others_are_quantized_is_not_to_be_removed(rest: str) -> None:
    for accounts, mend in (
        (of(FP8), "name the dense layers in its list of exceptions"),
        (of(description=SLIM), f"name the dense layers FLOAT in {DESCRIPTION}"),
    ):
        with pytest.raises(SchemeError) as caught:
            Schemes(accounts, ("model.norm.weight", rest)).decide(MODULE, PLAIN)
        line = str(caught.value)
        assert f"other tensors of the checkpoint are quantized: {mend}, or say --scheme bf16" in line
        assert "remove" not in line
        assert "move" not in line


def test_a_description_of_weights_that_were_cast_is_kept_elsewhere() -> None:
    assert f"move {DESCRIPTION} to another folder" in refused(PLAIN, of(description=SLIM))


def test_fp8_by_channels_has_no_block_size_to_give() -> None:
    without = {"quant_method": "fp8"}
    assert refused(CHANNEL, of(without)).endswith("are fp8_channel; say --scheme fp8_channel")
    assert "give its weight_block_size in config.json, or say --scheme fp8_block" in refused(BLOCKS, of(without))


def test_modelopt_s_fp8_in_blocks() -> None:
    line = refused(BLOCKS, of(modelopt={"quant_algo": "FP8_PB_WO"}))
    assert "hf_quant_config.json (quant_algo FP8_PB_WO) says FP8_PB_WO" in line
    assert "vLLM computes the two alike; say --scheme fp8_block" in line


# No account.


@pytest.mark.parametrize(
    ("found", "scheme"),
    [(DYNAMIC, "w8a8_dynamic"), (STATIC, "w8a8_static"), (CHANNEL, "fp8_channel"), (tensors(weight="F16"), "bf16")],
)
def test_tensors_that_fit_one_scheme_alone(found: dict[str, StoredTensor], scheme: str) -> None:
    taken, block, warnings = decided(found, of())
    assert (taken, block) == (scheme, None)
    assert [f"fit {scheme} alone" in line for line in warnings] == ([] if scheme == "bf16" else [True])


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (OFFSETS, (DESCRIPTION, "vllm-ascend needs", "--scheme w8a8_dynamic")),  # or W8A16
        (STATIC_OF_BOTH, (DESCRIPTION, "--scheme w8a8_static or w8a8_mix")),
        (BLOCKS, ('"quant_method": "fp8"', "--scheme fp8_block, for blocks of 128 x 128")),
        (INT8_BLOCKS, ('"quant_method": "blockwise_int8"', "--scheme int8_block, for blocks of 128 x 128")),
        (FP4, ("are NVFP4; this version does not split it",)),
        (tensors(qweight="I32", qzeros="I32", scales="F16"), ("AWQ or GPTQ",)),
        (tensors(weight="I8"), ("of no format that is known",)),
        (tensors(weight="F8_E4M3"), ("are FP8 without scales",)),
        (tensors(weight="U32", scales="BF16", biases="BF16"), ("are MLX; this version",)),
        (tensors(compressed="I8", bitmask="U8", weight_scale="BF16 out,1"), ("sparse 2:4 of compressed-tensors",)),
    ],
)
def test_tensors_that_do_not_tell(found: dict[str, StoredTensor], says: tuple[str, ...]) -> None:
    line = refused(found, of())
    assert [part for part in (*says, "no quantization_config in config.json") if part not in line] == [], line
    assert "no config.json" in refused(found, Accounts())


def test_lines_of_many_linears_are_one() -> None:
    schemes = Schemes(of())
    for index in range(3):
        schemes.decide(f"model.layers.{index}.mlp.up_proj", DYNAMIC)
    (line,) = schemes.warnings()
    assert line.startswith("model.layers.0.mlp.up_proj and 2 more: nothing beside the files says")


def test_a_second_description_that_differs_is_named(tmp_path: Path) -> None:
    """vllm-ascend reads one name alone; a copy under the other name says nothing new."""
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    copy = tmp_path / "model" / "quant_model_description_w8a8_dynamic.json"
    copy.write_bytes((tmp_path / "model" / DESCRIPTION).read_bytes())
    with open_source(str(tmp_path / "model")) as source:
        assert describe(source).warnings == ()
    copy.write_text("{}")
    with open_source(str(tmp_path / "model")) as source:
        found = describe(source)
    assert found.warnings == (
        f"{copy.name} is not read, and differs from {DESCRIPTION}, which is what vllm-ascend reads",
    )
    assert found.side_files.keys() == {"config.json", DESCRIPTION}
