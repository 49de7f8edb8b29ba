"""A linear's tensors as files have them, what is said of it, and what Schemes makes of the two."""

from collections.abc import Mapping
from typing import Any

import pytest

from reshard.errors import SchemeError
from reshard.quantization import DESCRIPTION, Accounts, Schemes
from reshard.schemes.match import StoredTensor
from tests.support.builders import RECIPES

MODULE = "model.layers.0.mlp.gate_proj"
OUT, IN = 512, 256
SHAPES = {"out,in": (OUT, IN), "out,1": (OUT, 1), "out": (OUT,), "1": (1,), "blocks": (4, 2)}

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT8: dict[str, Any] = RECIPES["ct_dynamic"].quantization_config or {}


def tensors(**dtypes: str) -> dict[str, StoredTensor]:
    """A linear's tensors: suffix -> type and, with a space, what its shape is called."""
    found = {}
    for suffix, text in dtypes.items():
        dtype, _, shape = text.partition(" ")
        found[suffix] = StoredTensor(dtype, SHAPES[shape or "out,in"], "model.safetensors")
    return found


PLAIN = tensors(weight="BF16")
BLOCKS = tensors(weight="F8_E4M3", weight_scale_inv="F32 blocks")
CHANNEL = tensors(weight="F8_E4M3", weight_scale="BF16 out,1")
INT8_BLOCKS = tensors(weight="I8", weight_scale_inv="F32 blocks")
DYNAMIC = tensors(weight="I8", weight_scale="F32 out,1")
OFFSETS = DYNAMIC | tensors(weight_offset="F32 out,1")
STATIC = tensors(weight="I8", input_scale="F32 1", input_offset="F32 1", quant_bias="I32 out", deq_scale="F32 out")
STATIC_OF_BOTH = STATIC | tensors(weight_scale="F32 out,1", weight_offset="F32 out,1")
FP4 = tensors(weight="U8", weight_scale="F8_E4M3 out,1", weight_scale_2="F32 1", input_scale="F32 1")


def of(quantization: object = None, key: str = "quantization_config", **more: Any) -> Accounts:
    """Accounts of a config.json with this quantization."""
    return Accounts({} if quantization is None else {key: quantization}, **more)


def described(kind: str) -> tuple[str, dict[str, str]]:
    """ModelSlim's description that says this of the module."""
    return DESCRIPTION, {f"{MODULE}.weight": kind}


def decided(found: Mapping[str, StoredTensor], accounts: Accounts) -> tuple[str, tuple[int, int] | None, list[str]]:
    """(scheme, block, warnings)"""
    schemes = Schemes(accounts)
    variant, block = schemes.decide(MODULE, found)
    return variant.scheme, block, list(schemes.warnings())


def refused(found: Mapping[str, StoredTensor], accounts: Accounts) -> str:
    """The message."""
    with pytest.raises(SchemeError) as caught:
        decided(found, accounts)
    assert MODULE in str(caught.value)
    return str(caught.value)
