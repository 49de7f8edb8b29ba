"""What a config.json alone promises: types, and which of its modules an account of the quantization means."""

from typing import Any

import pytest

from reshard.checkpoint.config_only import config_checkpoint
from reshard.errors import SchemeError
from reshard.model.naming import WRAPPED

SIZES: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "hidden_act": "silu",
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def schemes(config: dict[str, Any]) -> set[str]:
    return {
        linear.variant.scheme for layer in config_checkpoint(config, "m").layers for linear in layer.linears.values()
    }


def wrapper(model_type: str, **quantization: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": SIZES, "quantization_config": {**FP8, **quantization}}


@pytest.mark.parametrize("prefix", ["model.", *WRAPPED])
@pytest.mark.parametrize("model_type", ["kimi_vl", "interns1", "a_wrapper"])
def test_a_wrapper_s_exceptions_are_found_under_every_prefix(model_type: str, prefix: str) -> None:
    left = [f"{prefix}layers.0.mlp", f"{prefix}layers.1.mlp"]
    assert schemes(wrapper(model_type)) == {"fp8_block"}
    assert schemes(wrapper(model_type, modules_to_not_convert=left)) == {"bf16"}


@pytest.mark.parametrize(("model_type", "warns"), [("kimi_vl", False), ("a_wrapper", True)])
def test_a_wrapper_that_is_not_known_is_named(model_type: str, warns: bool) -> None:
    lines = config_checkpoint(wrapper(model_type), "m").warnings
    assert (f"what precedes the layers' names in a {model_type!r} is not known" in " ".join(lines)) is warns


def test_accounts_that_differ_are_not_decided() -> None:
    other = {**SIZES, "quantization_config": FP8 | {"weight_block_size": [128, 256]}}
    with pytest.raises(SchemeError, match=r"fp8_block in blocks of 128 x 128, .* fp8_block in blocks of 128 x 256"):
        config_checkpoint({"text_config": other, "quantization_config": FP8}, "m")


@pytest.mark.parametrize(
    ("config", "dtype", "warns"),
    [
        ({**SIZES, "torch_dtype": "float16"}, "F16", 0),
        ({"text_config": {**SIZES, "dtype": "float32"}}, "F32", 0),
        ({"dtype": "float32", "text_config": {**SIZES, "torch_dtype": "float32"}}, "F32", 0),
        ({"dtype": "float16", "text_config": {**SIZES, "dtype": "float32"}}, "F16", 1),
        (SIZES, "BF16", 0),
    ],
    ids=str,
)
def test_the_type_may_be_said_within(config: dict[str, Any], dtype: str, warns: int) -> None:
    checkpoint = config_checkpoint(config, "m")
    assert {tensor.dtype for tensor in checkpoint.tensors()} == {dtype}
    assert ["dtype is float16 at its top, float32 in text_config" in line for line in checkpoint.warnings] == [
        True
    ] * warns
