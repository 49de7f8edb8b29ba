"""`verify --source` on sets of o_proj, the LM head and the embedding: whole, and with every kind of wrong byte."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.model.naming import shard_file
from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut
from tests.support.builders import Raw, read_safetensors
from tests.support.manifests import edit_manifest
from tests.support.part_models import Model, build
from tests.support.running import reshard
from tests.support.verifying import exchange, one_byte_changed, patch, split, verify

STATIC, O_PROJ = "modelslim_v0_static", "model.layers.1.self_attn.o_proj"
WEIGHTS = {"o_proj": f"{O_PROJ}.weight", "lm_head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}
KEYS = tuple(WEIGHTS)


class Made(NamedTuple):
    """A checkpoint, and a set that was cut from it for 2."""

    key: str
    source: Path
    shards: Path
    tensors: dict[str, Raw]

    def patch(self, rank: int, name: str, change: Callable[[bytes], bytes]) -> None:
        patch(self.shards, rank, 2, name, change, self.key)


def made(folder: Path, key: str, model: Model | None = None, weights: str = "keep") -> Made:
    tensors = build(folder / "source", model or Model())
    cut = Cut(2, part=PARTS[key], weights=weights)
    return Made(key, folder / "source", split(folder / "source", folder / "set", cut), tensors)


# --- what split writes is what verify wants ---

WHOLE = {
    **{f"o_proj {recipe}": ("o_proj", Model(recipe, computable=True)) for recipe in (
        "bf16", "fp32", "modelslim_dynamic", STATIC, "modelslim_fp16_static", "modelslim_mix", "ct_static_asymmetric",
        "fp8_block", "ct_fp8_channel", "fp8_tensor_static", "modelslim_mxfp8", "int8_block",
    )},
    "o_proj grouped": ("o_proj", Model(latent=False, prefix="model.language_model.")),
    "lm_head": ("lm_head", Model(prefix="language_model.model.")),
    "lm_head of less than its padding": ("lm_head", Model(vocabulary=3)),
    "lm_head declared": ("lm_head", Model("modelslim_dynamic", head="modelslim_dynamic", computable=True)),
    "embedding": ("embedding", Model(prefix="language_model.model.")),
    "embedding of less than its padding": ("embedding", Model(vocabulary=3)),
    "embedding, tied": ("embedding", Model(tied=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_right_is_clean(tmp_path: Path, name: str) -> None:
    key, model = WHOLE[name]
    one = made(tmp_path, key, model)
    verdict = verify(one.shards, one.source)
    assert verdict.clean(), (verdict.findings, verdict.computed, verdict.layers)
    assert verdict.all_layers == ([0, 1] if key == "o_proj" else [None])
    done = reshard("verify", one.shards, "--source", one.source, "--quiet", "--format", "json")
    assert (done.code, done.document["part"], len(done.document["layers"])) == (0, key, len(verdict.layers))


# --- any byte ---


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    models = {"o_proj": Model(STATIC), "lm_head": Model(), "embedding": Model()}
    return {key: made(tmp_path_factory.mktemp(key), key, model) for key, model in models.items()}


@settings(max_examples=40, deadline=None)
@given(
    key=st.sampled_from(KEYS),
    rank=st.integers(0, 1),
    at=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
    any_place=st.booleans(),
)
def test_any_flipped_byte_is_found(
    sets: dict[str, Made], key: str, rank: int, at: float, mask: int, any_place: bool
) -> None:
    """Also one of the zeros behind the vocabulary."""
    one = sets[key]
    path = one.shards / shard_file(rank, 2, key)
    with one_byte_changed(path, at, mask, any_place=any_place) as hit:
        verdict = verify(one.shards, one.source)
    assert verdict.where("bytes") == [f"{path.name}: {hit}"]


# --- what goes wrong most easily ---


def rolled(axis: int, rows: int, itemsize: int) -> Callable[[bytes], bytes]:
    """One row, or column, further on."""

    def change(raw: bytes) -> bytes:
        return np.roll(np.frombuffer(raw, np.uint8).reshape(rows, -1), itemsize if axis else 1, axis).tobytes()

    return change


def other_rank(one: Made, name: str) -> Callable[[bytes], bytes]:
    held = read_safetensors(one.shards / shard_file(0, 2, one.key))[name][2]
    return lambda raw: held


def check_wrong(one: Made, name: str, computed: bool = True, rank: int = 1) -> None:
    """That the byte comparison names the tensor, and whether the computation shows it."""
    verdict = verify(one.shards, one.source)
    assert verdict.where("bytes") == [f"{shard_file(rank, 2, one.key)}: {name}"]
    assert [finding.where for finding in verdict.computed] == ([_module(one.key)] if computed else [])
    assert all("unsplit" in finding.message for finding in verdict.computed)
    done = reshard("verify", one.shards, "--source", one.source, "--quiet")
    assert done.code == 3
    assert f"bytes: {shard_file(rank, 2, one.key)}: {name}: row" in done.out


def _module(key: str) -> str:
    return WEIGHTS[key].rpartition(".")[0] if key != "o_proj" else "model.layers.1.self_attn"


@pytest.mark.parametrize("key", KEYS)
def test_exchanged_ranks(tmp_path: Path, key: str) -> None:
    one = made(tmp_path, key)
    exchange(one.shards, key)
    verdict = verify(one.shards, one.source)
    assert len(verdict.where("bytes")) == (4 if key == "o_proj" else 2)
    assert len(verdict.computed) == (2 if key == "o_proj" else 1)


@pytest.mark.parametrize("key", KEYS)
def test_another_ranks_share(tmp_path: Path, key: str) -> None:
    one = made(tmp_path, key)
    one.patch(1, WEIGHTS[key], other_rank(one, WEIGHTS[key]))
    check_wrong(one, WEIGHTS[key])


@pytest.mark.parametrize(("key", "axis", "rows"), [("o_proj", 1, 128), ("lm_head", 0, 64), ("embedding", 0, 64)])
def test_shifted_by_one(tmp_path: Path, key: str, axis: int, rows: int) -> None:
    one = made(tmp_path, key)
    one.patch(1, WEIGHTS[key], rolled(axis, rows, 2))
    check_wrong(one, WEIGHTS[key])


@pytest.mark.parametrize("key", ["lm_head", "embedding"])
def test_the_vocabulary_divided_before_it_is_padded(tmp_path: Path, key: str) -> None:
    """50 rows of 100 and 14 of zeros each, as some engines do it, in place of 64 and 36."""
    one = made(tmp_path, key)
    whole = one.tensors[WEIGHTS[key]][2]
    half = len(whole) // 2
    one.patch(0, WEIGHTS[key], lambda raw: whole[:half].ljust(len(raw), b"\0"))
    one.patch(1, WEIGHTS[key], lambda raw: whole[half:].ljust(len(raw), b"\0"))
    verdict = verify(one.shards, one.source)
    assert len(verdict.where("bytes")) == 2
    assert len(verdict.computed) == 1


@pytest.mark.parametrize("key", ["lm_head", "embedding"])
def test_padding_that_is_not_zero(tmp_path: Path, key: str) -> None:
    """Nothing is computed with it."""
    one = made(tmp_path, key)
    one.patch(1, WEIGHTS[key], lambda raw: raw[:-2] + b"\x80\x3f")
    check_wrong(one, WEIGHTS[key], computed=False)
    assert "row 63, column 127 is 1 (0x3f80), must be 0" in verify(one.shards, one.source).findings[0].message


@pytest.mark.parametrize("recipe", [STATIC, "modelslim_static", "modelslim_fp16_static"])
def test_the_bias_on_every_rank(tmp_path: Path, recipe: str) -> None:
    one = made(tmp_path, "o_proj", Model(recipe, computable=True))
    one.patch(1, f"{O_PROJ}.quant_bias", other_rank(one, f"{O_PROJ}.quant_bias"))
    check_wrong(one, f"{O_PROJ}.quant_bias")


def test_the_bias_on_no_rank(tmp_path: Path) -> None:
    one = made(tmp_path, "o_proj", Model(STATIC, computable=True))
    one.patch(0, f"{O_PROJ}.quant_bias", lambda raw: bytes(len(raw)))
    check_wrong(one, f"{O_PROJ}.quant_bias", rank=0)


@pytest.mark.parametrize(
    ("recipe", "suffix"),
    [("modelslim_dynamic", "weight_scale"), ("fp8_block", "weight_scale_inv"), ("ct_fp8_channel", "weight_scale")],
)
def test_scales_of_another_channel_or_block(tmp_path: Path, recipe: str, suffix: str) -> None:
    one = made(tmp_path, "o_proj", Model(recipe, hidden=256, computable=True))
    name = f"{O_PROJ}.{suffix}"
    one.patch(1, name, lambda raw: raw[len(raw) // 2 :] + raw[: len(raw) // 2])
    check_wrong(one, name)


def test_another_sets_computation_is_not_the_sources(tmp_path: Path) -> None:
    one = made(tmp_path / "one", "embedding")
    build(tmp_path / "other", Model(seed=1))
    verdict = verify(one.shards, tmp_path / "other")
    assert len(verdict.where("bytes")) == 2
    assert "unsplit" in verdict.computed[0].message


def test_a_vocabulary_padded_otherwise(tmp_path: Path) -> None:
    """To 128 for each rank, as its manifest would say."""
    one = made(tmp_path, "lm_head")
    edit_manifest(one.shards, lambda m: m["padding"].update(padded_size=256))
    verdict = verify(one.shards, one.source)
    assert verdict.findings[-1].message == "manifest.json: 100 is padded to 256, engines pad it to a multiple of 64"
    assert not verdict.layers


@pytest.mark.parametrize("key", KEYS)
def test_a_set_of_another_part_than_the_source_has(tmp_path: Path, key: str) -> None:
    one = made(tmp_path / "one", key)
    lacking = {name: None for name in one.tensors if name.endswith(WEIGHTS[key].rpartition("layers.1.")[2])}
    build(tmp_path / "other", Model(), **lacking)
    done = reshard("verify", one.shards, "--source", tmp_path / "other", "--quiet")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"no {PARTS[key].name}: no tensor" in done.err


# --- conversions ---


@pytest.mark.parametrize(
    ("recipe", "weights", "scheme"),
    [("fp8_block", "bf16", "bf16"), ("ct_fp8_channel", "bf16", "bf16"), ("fp8_tensor", "bf16", "bf16"),
     ("modelslim_mxfp8", "bf16", "bf16"), ("fp16", "bf16", "bf16"), ("bf16", "w8a8", "w8a8_dynamic"),
     ("fp8_block", "w8a8", "w8a8_dynamic")],
)  # fmt: skip
def test_converted_o_proj(tmp_path: Path, recipe: str, weights: str, scheme: str) -> None:
    pytest.importorskip("torch")
    one = made(tmp_path, "o_proj", Model(recipe, hidden=256, computable=True), weights=weights)
    verdict = verify(one.shards, one.source)
    assert verdict.clean(), (verdict.findings, verdict.computed)
    done = reshard("inspect", one.shards, "--format", "json")
    assert done.document["scheme"] == scheme
    held = read_safetensors(one.shards / shard_file(1, 2, "o_proj"))
    assert held[f"{O_PROJ}.weight"][:2] == ("BF16" if weights == "bf16" else "I8", (256, 128))
    one.patch(1, f"{O_PROJ}.weight", lambda raw: raw[:7] + bytes([raw[7] ^ 1]) + raw[8:])
    assert verify(one.shards, one.source).where("bytes") == [f"{shard_file(1, 2, 'o_proj')}: {O_PROJ}.weight"]
