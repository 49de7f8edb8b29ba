"""--scheme: what it opens, what it must not contradict; and what accounts come to in whole commands."""

import json
from pathlib import Path

import pytest

from reshard.checkpoint.config_only import config_checkpoint
from reshard.errors import SchemeError, UsageError
from reshard.plan.manifest_builder import scheme_name
from reshard.quantization import DESCRIPTION, Accounts, Schemes
from reshard.schemes.match import StoredTensor
from tests.support import field
from tests.support.builders import Spec, build
from tests.support.checking import failed
from tests.support.corrupt import config
from tests.support.linears import (
    BLOCKS,
    CHANNEL,
    FP4,
    FP8,
    INT8,
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
from tests.support.running import reshard


@pytest.mark.parametrize(
    ("found", "accounts", "scheme", "warnings"),
    [
        (BLOCKS, of(), "fp8_block", 0),
        (OFFSETS, of(), "w8a8_dynamic", 0),
        (OFFSETS, of(INT8), "w8a8_dynamic", 0),
        (STATIC_OF_BOTH, of(), "w8a8_mix", 0),
        (BLOCKS, of(modelopt={"quant_algo": "MIXED_PRECISION"}), "fp8_block", 0),
        (BLOCKS, of(FP8), "fp8_block", 0),
        (BLOCKS, of({"quant_method": "fp8"}), "fp8_block", 1),
        (CHANNEL, of(FP8), "fp8_channel", 1),
    ],
)
def test_what_is_told(found: dict[str, StoredTensor], accounts: Accounts, scheme: str, warnings: int) -> None:
    told = Accounts(accounts.config, accounts.description, accounts.modelopt, scheme)
    taken, block, lines = decided(found, told)
    assert (taken, len(lines)) == (scheme, warnings)
    assert block == ((128, 128) if scheme == "fp8_block" else None)


def test_a_told_scheme_has_the_config_s_block() -> None:
    found = tensors(weight="F8_E4M3") | {"weight_scale_inv": StoredTensor("F32", (8, 2), "f")}
    assert decided(found, of(FP8 | {"weight_block_size": [64, 128]}, scheme="fp8_block"))[1] == (64, 128)
    assert "shape [8, 2], with a weight of [512, 256] (blocks of 128 x 128)" in refused(found, of(scheme="fp8_block"))


@pytest.mark.parametrize(
    ("found", "accounts", "says"),
    [
        (
            BLOCKS,
            of(scheme="w8a8_dynamic"),
            ("--scheme says w8a8_dynamic, and its", "out, or say --scheme fp8_block"),
        ),
        (
            FP4,
            of(scheme="w8a8_dynamic"),
            ("says w8a8_dynamic", "are NVFP4; this version does not split it"),
        ),
        (
            STATIC,
            of(description=described("W8A8"), scheme="w8a8_mix"),
            ("are w8a8_static, as quant_model", "leave --scheme out, or say --scheme w8a8_static"),
        ),
        (
            STATIC_OF_BOTH,
            of(description=described("W8A8"), scheme="w8a8_mix"),
            (f"--scheme says w8a8_mix, {DESCRIPTION} (W8A8) says w8a8_static", "leave --scheme out"),
        ),
        (PLAIN, of(FP8, scheme="fp8_block"), ("plain BF16",)),
    ],
)
def test_what_is_told_and_is_not_so(found: dict[str, StoredTensor], accounts: Accounts, says: tuple[str, ...]) -> None:
    line = refused(found, accounts)
    assert [part for part in says if part not in line] == [], line


def test_a_told_scheme_that_nothing_is_of() -> None:
    with pytest.raises(SchemeError, match="--scheme fp8_block: no dense layer is fp8_block: each is a plain float"):
        decided(PLAIN, of(scheme="fp8_block"))


def test_an_unknown_scheme() -> None:
    with pytest.raises(UsageError, match="--scheme: unknown scheme int4; supported are bf16, w8a8_dynamic"):
        Schemes(of(scheme="int4"))


# Whole commands.


def test_a_config_alone_with_two_accounts() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "hidden_act": "silu"}
    both = {"text_config": {**sizes, "quantization_config": FP8}, "quantization_config": INT8}
    with pytest.raises(SchemeError, match=r"says w8a8_dynamic, config\.json .* says fp8_block: give the checkpoint"):
        config_checkpoint(both, "model")
    assert scheme_name(config_checkpoint(both, "model", "fp8_block").layers) == "fp8_block"
    assert scheme_name(config_checkpoint(sizes | {"compression_config": INT8}, "model").layers) == "w8a8_dynamic"


def test_a_config_alone_with_an_online_transform(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("ct_dynamic"))
    place = {"targets": ["Linear"], "location": "input"}
    transform = {"config_groups": {"v": {"type": "hadamard", "apply": [place]}}}
    config(quantization_config={**(INT8 or {}), "transform_config": transform})(tmp_path / "model")
    ((check, message),) = failed("--config", tmp_path / "model" / "config.json", "--tp", 2)
    assert (check, "has the transform v at its input" in message) == ("scheme", True)


def test_converted_weights_leave_no_account_behind(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block", config={"compression_config": FP8}))
    done = reshard("split", tmp_path / "model", tmp_path / "s", "--tp", 2, "--weights", "bf16", "--quiet")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "s" / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & written.keys()


@pytest.mark.parametrize("command", ["inspect", "split", "check"])
def test_scheme_is_an_option_of(command: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block"))
    config(quantization_config=None)(tmp_path / "model")
    arguments = {"split": (tmp_path / "s", "--tp", 2), "check": ("--tp", 2), "inspect": ()}[command]
    assert reshard(command, tmp_path / "model", *arguments).code == {"check": 3}.get(command, 1)
    done = reshard(command, tmp_path / "model", *arguments, "--scheme", "fp8_block")
    assert (done.code, "fp8_block" in done.out) == (0, True)


def test_scheme_of_verify_is_the_source_s(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("bf16"))
    assert reshard("split", tmp_path / "model", tmp_path / "s", "--tp", 2).code == 0
    done = reshard("verify", tmp_path / "s", "--scheme", "bf16")
    assert done.code == 2
    assert "--scheme bf16: is the source's; give --source" in done.err


# Checkpoints from the field.

TOLD = {
    "c16-w8a8-description-lost": "w8a8_dynamic",
    "c30-fp8-config-stripped": "fp8_block",
    "c39-meituan-no-quantization-config": "w8a8_dynamic",
    "c41-modelarts-without-description": "w8a8_dynamic",
    "c42-w4afp8-hf-quant-config": "fp8_block",
}
"""What --scheme opens."""


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
