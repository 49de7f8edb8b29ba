"""`reshard verify --source`: a finding for everything that is not what `split` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.checks.finding import Finding
from reshard.errors import SourceError
from reshard.model.naming import MANIFEST, shard_file
from reshard.plan.pipeline import Cut
from reshard.source.open import describe, open_source
from tests.support.builders import Raw, Spec, build, read_safetensors, write_safetensors
from tests.support.manifests import edit_manifest
from tests.support.verifying import (
    DOWN,
    GATE_UP,
    MLP,
    Verdict,
    always,
    exchange,
    made,
    one_byte_changed,
    patch,
    read_all,
    rewrite,
    split,
    verify,
)

STATIC = ("modelslim_static", "modelslim_v0_static", "modelslim_fp16_static", "modelslim_mix")


WHOLE = ["bf16", "fp8_block", "ct_fp8_channel", "modelslim_dynamic", "modelslim_static", "ct_static", "int8_block"]


@pytest.fixture(scope="module", params=["bf16", "modelslim_v0_static", "fp8_block", "modelslim_fp16_static"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return made(folder, Spec(request.param, hidden=96, intermediate=512, dense=1), Cut(2))


@settings(max_examples=60, deadline=None)
@given(tp_rank=st.integers(0, 1), at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), big=st.booleans())
def test_any_flipped_byte_is_found(pair: tuple[Path, Path], tp_rank: int, at: float, mask: int, big: bool) -> None:
    source, shards = pair
    path = shards / shard_file(tp_rank, 2)
    with one_byte_changed(path, at, mask, any_place=big) as hit:
        verdict = verify(shards, source)
    assert verdict.where("bytes") == [f"{path.name}: {hit}"]


def test_a_finding_names_place_and_both_values(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec("modelslim_dynamic", hidden=64, intermediate=128), Cut(2))
    at = (64 + 5) * 64 + 7  # up's sixth row on rank 1
    name = MLP.format(0, "up_proj.weight")
    stored = np.frombuffer(dict(read_all(source))[name][2], np.int8).reshape(128, 64)[64 + 5, 7]
    other = (int(stored) & 0xFF) ^ 0x80
    patch(shards, 1, 2, GATE_UP.format("weight"), lambda raw: raw[:at] + bytes([other]) + raw[at + 1 :])
    (finding,) = verify(shards, source).findings
    assert finding == Finding(
        "bytes",
        f"{shard_file(1, 2)}: {GATE_UP.format('weight')}",
        f"row 69, column 7 is {int(np.uint8(other).view(np.int8))} (0x{other:02x}), must be {stored} "
        f"(0x{int(stored) & 0xFF:02x}): {name} row 69, column 7",
    )


def wrong(verdict: Verdict, *names: str) -> bool:
    """Bytes differ in these tensors, and the computation by far more than rounding."""
    hit = {where.partition(": ")[2] for where in verdict.where("bytes")}
    assert hit == set(names), verdict.findings
    assert all("unsplit" in finding.message for finding in verdict.computed)
    return bool(verdict.computed) and max(r.difference / r.bound for r in verdict.layers) > 1e4


@pytest.mark.parametrize("recipe", WHOLE)
def test_gate_and_up_swapped(recipe: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(recipe, dense=1), Cut(2))
    patch(shards, 1, 2, GATE_UP.format("weight"), lambda raw: raw[len(raw) // 2 :] + raw[: len(raw) // 2])
    assert wrong(verify(shards, source), GATE_UP.format("weight"))


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_slice_of_the_stacked_matrix(recipe: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(recipe, dense=1), Cut(2))
    tensors = read_all(source)
    for rank, role in enumerate(("gate_proj", "up_proj")):  # at tp 2, half the stacked matrix is all of one
        whole = tensors[MLP.format(0, f"{role}.weight")][2]
        patch(shards, rank, 2, GATE_UP.format("weight"), always(whole))
    assert wrong(verify(shards, source), GATE_UP.format("weight"))


@pytest.mark.parametrize("recipe", WHOLE)
def test_columns_of_down_in_another_order(recipe: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(recipe, dense=1), Cut(2))
    itemsize = 2 if recipe == "bf16" else 1

    def rotated(raw: bytes) -> bytes:
        return np.roll(np.frombuffer(raw, np.uint8).reshape(256, -1), itemsize, axis=1).tobytes()

    patch(shards, 0, 2, DOWN.format("weight"), rotated)
    assert wrong(verify(shards, source), DOWN.format("weight"))


def test_exchanged_ranks_are_found_though_their_sum_is_the_same(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(dense=1), Cut(2))
    exchange(shards)
    verdict = verify(shards, source)
    assert not verdict.computed
    assert len(verdict.where("bytes")) == 4


def test_shares_that_do_not_belong_together(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(dense=1), Cut(2))
    tensors = [read_safetensors(shards / shard_file(rank, 2)) for rank in (0, 1)]
    for rank in (0, 1):  # each rank has the other's columns of down
        patch(shards, rank, 2, DOWN.format("weight"), always(tensors[1 - rank][DOWN.format("weight")][2]))
    assert wrong(verify(shards, source), DOWN.format("weight"))


@pytest.mark.parametrize("recipe", STATIC)
def test_quant_bias_on_every_rank(recipe: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(recipe, dense=1), Cut(2))
    bias = read_all(source)[DOWN.format("quant_bias")][2]
    patch(shards, 1, 2, DOWN.format("quant_bias"), lambda raw: bias)
    verdict = verify(shards, source)
    assert verdict.where("bytes") == [f"{shard_file(1, 2)}: {DOWN.format('quant_bias')}"]
    # W8A8_MIX is computed with its dynamic set, which has no such bias.
    assert wrong(verdict, DOWN.format("quant_bias")) or recipe == "modelslim_mix"


def test_quant_bias_on_no_rank(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec("modelslim_static", dense=1), Cut(2))
    patch(shards, 0, 2, DOWN.format("quant_bias"), lambda raw: bytes(len(raw)))
    assert wrong(verify(shards, source), DOWN.format("quant_bias"))


def test_padding_that_is_not_zero(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(intermediate=500, dense=1), Cut(3, pad=True))
    patch(shards, 2, 3, DOWN.format("weight"), lambda raw: raw[:-2] + b"\x80\x3f")
    (finding,) = verify(shards, source).findings
    assert "is 1 (0x3f80), must be 0" in finding.message


def test_another_source(tmp_path: Path) -> None:
    _, shards = made(tmp_path, Spec(seed=0, dense=1), Cut(2))
    build(tmp_path / "other", Spec(seed=1, dense=1))
    assert wrong(verify(shards, tmp_path / "other"), GATE_UP.format("weight"), DOWN.format("weight"))


def test_source_files_by_another_header(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(files=1), Cut(2))
    file = source / "model-00001-of-00001.safetensors"
    write_safetensors(file, read_safetensors(file), {"format": "pt", "edited": "yes"})
    (finding,) = verify(shards, source).findings
    assert (finding.check, finding.where) == ("identity", file.name)
    (source / "model.safetensors.index.json").unlink()
    file.rename(source / "renamed.safetensors")
    assert verify(shards, source).where("identity") == [file.name, "renamed.safetensors"]


def test_a_source_with_another_layer(tmp_path: Path) -> None:
    _, shards = made(tmp_path, Spec(dense=1), Cut(2))
    build(tmp_path / "other", Spec(dense=2))
    verdict = verify(shards, tmp_path / "other")
    assert {
        f"{shard_file(r, 2)}: {MLP.format(1, n)}" for r in (0, 1) for n in ("gate_up_proj.weight", "down_proj.weight")
    } == set(verdict.where("names"))
    assert verdict.where("model") == [MANIFEST] * 2
    assert [result.layer for result in verdict.layers] == [0]
    assert not verdict.computed


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (lambda t: t.pop(DOWN.format("weight_scale")), "names", "missing; it must be BF16 [256, 1]"),
        (lambda t: t.update({DOWN.format("weight_offset"): t[DOWN.format("weight_scale")]}), "names", "no such tensor"),
        (
            lambda t: t.update({DOWN.format("weight_scale"): ("F16", *t[DOWN.format("weight_scale")][1:])}),
            "dtype",
            "is F16, must be BF16",
        ),
        (
            lambda t: t.update({DOWN.format("weight_scale"): ("BF16", (256,), t[DOWN.format("weight_scale")][2])}),
            "shape",
            "is [256], must be [256, 1]",
        ),
    ],
)
def test_names_types_and_shapes(
    change: Callable[[dict[str, Raw]], object], check: str, message: str, tmp_path: Path
) -> None:
    source, shards = made(tmp_path, Spec("ct_dynamic", dense=1), Cut(2))
    rewrite(shards, 1, 2, change)
    (finding,) = verify(shards, source).findings
    assert finding.check == check
    assert finding.where.startswith(shard_file(1, 2))
    assert message in finding.message


def test_slices_of_the_manifest_that_are_wrong_as_the_bytes_are(tmp_path: Path) -> None:
    """Two ranks exchanged, and said to be so: no rank holds what it must."""
    source, shards = made(tmp_path, Spec(dense=1), Cut(2))
    exchange(shards)

    def exchange_slices(manifest: dict[str, Any]) -> None:
        first, second = manifest["shards"]
        first["tensors"], second["tensors"] = second["tensors"], first["tensors"]

    edit_manifest(shards, exchange_slices)
    with (
        open_source(str(shards)) as cut,
        pytest.raises(SourceError, match="its header says tp_rank '1'"),
    ):
        describe(cut)
    assert len(verify(shards, source).where("bytes")) == 4


@pytest.mark.parametrize("rule", ["dequantise_to_bf16", "cast_to_bf16", "quantise_to_int8_per_channel", "magic"])
def test_a_conversion_that_never_was(rule: str, tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec("modelslim_dynamic", dense=1), Cut(2))

    def claim(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            for tensor in shard["tensors"]:
                tensor["conversion"] = {"rule": rule, "inputs": []}

    edit_manifest(shards, claim)
    verdict = verify(shards, source)
    assert verdict.where("conversion") == [GATE_UP.format("")[:-1], DOWN.format("")[:-1]]
    assert not verdict.layers
    edit_manifest(shards, lambda m: m["shards"][0]["tensors"][0].pop("conversion"))
    assert "different conversions" in verify(shards, source).findings[0].message


def test_a_conversion_that_is_not_recorded(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec("fp32", dense=1), Cut(2, weights="bf16"))

    def forget(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            for tensor in shard["tensors"]:
                tensor["conversion"] = None

    edit_manifest(shards, forget)
    assert len(verify(shards, source).where("dtype")) == 4


def test_a_share_of_half_a_block(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec("fp8_block", dense=1, intermediate=512), Cut(4))
    edit_manifest(shards, lambda m: m.update(padding={"padded_size": 576, "multiple": 1}))
    verdict = verify(shards, source)
    assert "144 is not a multiple of the 128-wide scale block" in verdict.findings[0].message


def test_a_missing_or_broken_shard(tmp_path: Path) -> None:
    source, shards = made(tmp_path, Spec(dense=1), Cut(2))
    (shards / shard_file(0, 2)).unlink()
    (shards / shard_file(1, 2)).write_bytes(b"")
    verdict = verify(shards, source)
    assert [finding.check for finding in verdict.findings] == ["file", "header"]
    assert verdict.layers == []


def test_a_weight_that_is_no_number(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(source, Spec("bf16", files=1, dense=1))
    file = source / "model-00001-of-00001.safetensors"
    tensors = read_safetensors(file)
    name = MLP.format(0, "up_proj.weight")
    tensors[name] = (*tensors[name][:2], b"\xc0\x7f" + tensors[name][2][2:])
    write_safetensors(file, tensors)
    verdict = verify(split(source, tmp_path / "shards", Cut(2)), source)
    assert verdict.findings == []
    assert "no number" in verdict.computed[0].message
