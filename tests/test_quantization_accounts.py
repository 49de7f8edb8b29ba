"""Accounts of a quantization against the tensors: which is taken, which is named as stale, what --scheme decides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import SchemeError
from reshard.quantization import Accounts, Schemes, list_accounts, without_quantization
from reshard.schemes import Found
from reshard.source.open import describe, open_source
from tests.builders import RECIPES, Spec, build

MODULE = "model.layers.0.mlp.gate_proj"
DESCRIPTION = "quant_model_description.json"
OUT, IN = 512, 256
SHAPES = {"out,in": (OUT, IN), "out,1": (OUT, 1), "out": (OUT,), "1": (1,), "blocks": (4, 2)}

FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT8 = RECIPES["ct_dynamic"].quantization_config
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4}
SLIM = (DESCRIPTION, {f"{MODULE}.weight": "W8A8_DYNAMIC"})
NVFP4 = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}


def tensors(**dtypes: str) -> dict[str, Found]:
    """A linear's tensors: suffix -> type and, with a space, what its shape is called."""
    found = {}
    for suffix, text in dtypes.items():
        dtype, _, shape = text.partition(" ")
        found[suffix] = Found(dtype, SHAPES[shape or "out,in"], "model.safetensors")
    return found


PLAIN = tensors(weight="BF16")
BLOCKS = tensors(weight="F8_E4M3", weight_scale_inv="F32 blocks")
CHANNEL = tensors(weight="F8_E4M3", weight_scale="BF16 out,1")
INT8_BLOCKS = tensors(weight="I8", weight_scale_inv="F32 blocks")
DYNAMIC = tensors(weight="I8", weight_scale="F32 out,1")
OFFSETS = DYNAMIC | tensors(weight_offset="F32 out,1")
STATIC = tensors(weight="I8", input_scale="F32 1", input_offset="F32 1", quant_bias="I32 out", deq_scale="F32 out")
FP4 = tensors(weight="U8", weight_scale="F8_E4M3 out,1", weight_scale_2="F32 1", input_scale="F32 1")


def decided(found: Mapping[str, Found], accounts: Accounts) -> tuple[str, tuple[int, int] | None, list[str]]:
    """(scheme, block, warnings)"""
    schemes = Schemes(accounts)
    variant, block = schemes.decide(MODULE, found)
    return variant.scheme, block, list(schemes.warnings())


def refused(found: Mapping[str, Found], accounts: Accounts) -> str:
    """The message."""
    with pytest.raises(SchemeError) as caught:
        decided(found, accounts)
    assert MODULE in str(caught.value)
    return str(caught.value)


def of(quantization: object = None, key: str = "quantization_config", **more: Any) -> Accounts:
    """Accounts of a config.json with this quantization."""
    return Accounts({} if quantization is None else {key: quantization}, **more)


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
        {"quantization_config": FP8, "compression_config": INT8},
    ],
    ids=str,
)
def test_the_places_in_a_config(levels: dict[str, Any]) -> None:
    (account,) = list_accounts(Accounts(levels))
    assert account.file == "config.json"
    assert decided(BLOCKS, Accounts(levels)) == ("fp8_block", (128, 128), [])
    assert list_accounts(Accounts(without_quantization(levels))) == ()


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
def test_modelopt_s_own_file(content: dict[str, Any], found: dict[str, Found], scheme: str) -> None:
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
def test_accounts_that_agree(found: dict[str, Found], accounts: Accounts, scheme: str) -> None:
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
        (FP4, of(FP8, modelopt=NVFP4), ("are NVFP4, as hf_quant_config.json (quant_algo NVFP4) says", "not split by this version")),
        (FP4, of(FP8), ("says fp8_block, and its tensors (", "are NVFP4, which this version does not split")),
        (PLAIN, of(FP8, modelopt={"quant_algo": None}), ("are plain BF16, as hf_quant_config.json", "--scheme bf16")),
        (CHANNEL, of(FP8), ("are fp8_channel", "config.json is not of these weights", "--scheme fp8_channel")),
        (
            BLOCKS,
            of(FP8 | {"ignored_layers": [MODULE]}),
            ("quantization_config.ignored_layers) says bf16", "fp8_block"),
        ),
        (OFFSETS, of(INT8), ("ModelSlim's", f"{DESCRIPTION} is missing", "--scheme w8a8_dynamic")),
        (STATIC, of(description=SLIM), ("says w8a8_dynamic", "are w8a8_static", "--scheme w8a8_static")),
    ],
)
def test_both_sides_are_named(found: dict[str, Found], accounts: Accounts, says: tuple[str, ...]) -> None:
    line = refused(found, accounts)
    assert [part for part in says if part not in line] == [], line


@pytest.mark.parametrize("quantization", [FP8, INT8, AWQ])
def test_plain_weights_beside_a_quantised_config(quantization: dict[str, Any]) -> None:
    line = refused(PLAIN, of(quantization))
    assert "model.safetensors is plain BF16 with no scales: weights that were cast" in line
    assert "remove quantization_config from config.json" in line
    assert "--scheme bf16" in line
    scheme, _, (warning,) = decided(PLAIN, of(quantization, scheme="bf16"))
    assert scheme == "bf16"
    assert "which the tensors do not fit: taken as bf16, by --scheme" in warning


# No account.


@pytest.mark.parametrize(
    ("found", "scheme"),
    [(DYNAMIC, "w8a8_dynamic"), (STATIC, "w8a8_static"), (CHANNEL, "fp8_channel"), (tensors(weight="F16"), "bf16")],
)
def test_tensors_that_fit_one_scheme_alone(found: dict[str, Found], scheme: str) -> None:
    taken, block, warnings = decided(found, of())
    assert (taken, block) == (scheme, None)
    assert [f"fit {scheme} alone" in line for line in warnings] == ([] if scheme == "bf16" else [True])


STATIC_OF_BOTH = STATIC | tensors(weight_scale="F32 out,1", weight_offset="F32 out,1")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (OFFSETS, (DESCRIPTION, "vllm-ascend needs", "--scheme w8a8_dynamic")),  # or W8A16
        (STATIC_OF_BOTH, (DESCRIPTION, "--scheme w8a8_static or w8a8_mix")),
        (BLOCKS, ('"quant_method": "fp8"', "--scheme fp8_block, for blocks of 128 x 128")),
        (INT8_BLOCKS, ('"quant_method": "blockwise_int8"', "--scheme int8_block, for blocks of 128 x 128")),
        (FP4, ("are NVFP4, which this version does not split",)),
        (tensors(qweight="I32", qzeros="I32", scales="F16"), ("AWQ or GPTQ",)),
        (tensors(weight="I8"), ("of no format that is known",)),
    ],
)
def test_tensors_that_do_not_tell(found: dict[str, Found], says: tuple[str, ...]) -> None:
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
