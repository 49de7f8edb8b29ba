"""The bytes of o_proj, LM head and embedding, against a cut by hand; again from sets, and put together."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.errors import AlignmentError
from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut
from tests.support.builders import RECIPES, Raw, read_folder, read_safetensors
from tests.support.cut_by_hand import BLOCK, GROUP, check_set
from tests.support.part_models import HEAD_SIZE, KEYS, WRAPPERS, Model, build, tensors_of, write
from tests.support.running import reshard, split
from tests.support.sets import snapshot

ONCE = ("lm_head", "embedding")


def cut(key: str, tp: int) -> Cut:
    return Cut(tp, part=PARTS[key])


def share_of(key: str, model: Model, tp: int) -> int | None:
    """The columns, or rows, of a rank; None where such a size must be refused. By hand: engines pad to 64."""
    recipe = {"o_proj": model.recipe, "lm_head": model.head, "embedding": model.embedding}[key]
    rules = {rule for _, rule in RECIPES[recipe].tensors.values()}
    grid = BLOCK if "blocks" in rules else GROUP if "groups" in rules and key == "o_proj" else 1
    size = model.attention if key == "o_proj" else -(-model.vocabulary // 64) * 64
    return size // tp if size % (tp * grid) == 0 or tp == 1 else None


def check_cut(folder: Path, key: str, model: Model, tensors: dict[str, Raw], tp: int) -> bool:
    """Cut, or refused, as it must be. Returns whether it was cut."""
    share, out = share_of(key, model, tp), folder / f"{key}-{tp}"
    if share is None:
        with pytest.raises(AlignmentError, match=r"; use "):
            split(folder / "source", out, cut(key, tp))
        assert not out.exists()
        return False
    split(folder / "source", out, cut(key, tp))
    check_set(out, model.of(key, tensors), tp, share, key=key)
    return True


@pytest.mark.parametrize("recipe", RECIPES)
def test_o_proj_of_every_recipe(tmp_path: Path, recipe: str) -> None:
    model = Model(recipe, attention=512)
    tensors = build(tmp_path / "source", model)
    assert all(check_cut(tmp_path, "o_proj", model, tensors, tp) for tp in (1, 2, 4))


@settings(deadline=None, max_examples=20)
@given(
    recipe=st.sampled_from(["bf16", "fp32", "modelslim_v0_static", "fp8_block", "ct_fp8_channel", "modelslim_mxfp8"]),
    heads=st.integers(1, 16),
    vocabulary=st.integers(1, 300),
    tp=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64]),
    latent=st.booleans(),
    prefix=st.sampled_from(sorted(WRAPPERS)),
)  # fmt: skip
def test_any_sizes(recipe: str, heads: int, vocabulary: int, tp: int, latent: bool, prefix: str) -> None:
    model = Model(recipe, 32, heads * HEAD_SIZE, vocabulary, latent and prefix != "model.language_model.", prefix)
    with tempfile.TemporaryDirectory() as folder:
        tensors = build(Path(folder, "source"), model)
        for key in ("o_proj", *ONCE):
            check_cut(Path(folder), key, model, tensors, tp)


@pytest.mark.parametrize("key", ONCE)
@pytest.mark.parametrize(("vocabulary", "tp"), [(64, 1), (100, 1), (100, 64), (10, 64), (1, 64), (129, 3), (130, 96)])
def test_the_vocabulary_is_padded_to_64_and_then_divided(tmp_path: Path, key: str, vocabulary: int, tp: int) -> None:
    """Also for one rank; behind the vocabulary whole ranks are zeros."""
    model = Model(hidden=16, vocabulary=vocabulary)
    tensors = build(tmp_path / "source", model)
    assert check_cut(tmp_path, key, model, tensors, tp)
    held = [read_safetensors(path) for path in sorted((tmp_path / f"{key}-{tp}").glob("*.safetensors"))]
    share = -(-vocabulary // 64) * 64 // tp
    full = [any(data.strip(b"\0") for _, _, data in rank.values()) for rank in held]
    assert full == [rank * share < vocabulary for rank in range(tp)]
    assert {shape for rank in held for _, shape, _ in rank.values()} == {(share, 16)}


def test_the_bias_is_on_rank_0(tmp_path: Path) -> None:
    tensors = build(tmp_path / "source", Model("modelslim_static"))
    split(tmp_path / "source", tmp_path / "out", cut("o_proj", 4))
    name = "model.layers.1.self_attn.o_proj.quant_bias"
    held = [read_safetensors(path)[name] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert held[0] == tensors[name]
    assert np.frombuffer(held[0][2], np.int32).any()
    assert [set(data) for _, _, data in held[1:]] == [{0}, {0}, {0}]


@pytest.mark.parametrize("recipe", ["modelslim_dynamic", "modelslim_v0_static", "fp8_block"])
@pytest.mark.parametrize("key", ONCE)
def test_a_table_that_the_checkpoint_declares_quantized(tmp_path: Path, key: str, recipe: str) -> None:
    model = Model(recipe, vocabulary=250, head=recipe, embedding=recipe)
    tensors = build(tmp_path / "source", model)
    assert check_cut(tmp_path, key, model, tensors, 2)


GOLDEN = {
    "o_proj": [
        "862c92a01d60a4d96b9fd54cfdbe7a16398519abf29c3600ee5a0719611a1189",
        "f3cba69dec71b15cf504007a53d678434e054a4845f1b5ed05a16edc1d54380f",
    ],
    "lm_head": [
        "5814143b5dd91502cca99497b961bc56b14c162da9d04c6d1e78011f7a3519f1",
        "fb06e403c882f4108c5d778a617ec8ce1ce1780d1872e0f50daff306560ad35b",
    ],
    "embedding": [
        "830629e5e37475e2cd8e9c7b0542bc11f000212750ac2253d06bb6c3146c260f",
        "2cff53d6c93b329cd4fb035d609f827dd384583580d22717bca21db80232d132",
    ],
}


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_bytes(tmp_path: Path, key: str) -> None:
    """Another digest here is another file format: engines and existing sets would notice."""
    model = Model("modelslim_v0_static", 8, 64, 70, files=1, index=False)
    made = {
        name: (dtype, shape, bytes((place * 7 + number * 31) % 251 for place in range(len(data))))
        for number, (name, (dtype, shape, data)) in enumerate(tensors_of(model).items())
    }
    write(tmp_path / "source", model, made)
    assert check_cut(tmp_path, key, model, made, 2)
    files = sorted((tmp_path / f"{key}-2").glob("*.safetensors"))
    assert [blake3(path.read_bytes()).hexdigest() for path in files] == GOLDEN[key]


# --- a set is a source ---

AGAIN = {
    "o_proj": Model("modelslim_v0_static"),
    "o_proj in blocks": Model("fp8_block", attention=1024),
    "lm_head": Model(),
    "embedding": Model(vocabulary=70, prefix="language_model.model."),
    "lm_head declared": Model("modelslim_dynamic", vocabulary=250, head="modelslim_dynamic"),
}


@pytest.mark.parametrize("name", AGAIN)
def test_cut_again_and_put_together(tmp_path: Path, name: str) -> None:
    """8 -> 4 -> 1 -> 8: each is, file by file, what the original would have given; and merged, what it was cut from."""
    model, key = AGAIN[name], name.partition(" ")[0]
    tensors = build(tmp_path / "source", model)
    direct = {}
    for tp in (8, 4, 1):
        split(tmp_path / "source", tmp_path / f"direct{tp}", cut(key, tp))
        direct[tp] = snapshot(tmp_path / f"direct{tp}")
    before = tmp_path / "direct8"
    for number, tp in enumerate((4, 1, 8)):
        after = tmp_path / f"again{number}"
        split(before, after, Cut(tp))
        assert snapshot(after) == direct[tp], f"{before.name} to tp {tp}"
        before = after
    assert reshard("merge", before, tmp_path / "merged", "--quiet").code == 0
    assert read_folder(tmp_path / "merged") == model.of(key, tensors)


def test_sets_of_several_parts_are_put_together(tmp_path: Path) -> None:
    model = Model("ct_dynamic", prefix="model.language_model.", latent=False)
    tensors = build(tmp_path / "source", model)
    sizes = {"denseffn": 4, "lm_head": 8, "embedding": 2, "o_proj": 1}
    parts = [option for key in KEYS for option in ("--part", f"{key}={sizes[key]}")]
    assert reshard("split", tmp_path / "source", tmp_path / "parts", *parts, "--quiet").code == 0
    done = reshard("merge", tmp_path / "parts", tmp_path / "merged", "--quiet", "--format", "json")
    assert done.code == 0, done.err
    wanted = {name: raw for key in KEYS for name, raw in model.of(key, tensors).items()}
    assert read_folder(tmp_path / "merged") == wanted
    assert sum(file["tensors"] for file in done.document["files"]) == len(wanted)
    assert (tmp_path / "merged/config.json").read_bytes() == (tmp_path / "source/config.json").read_bytes()


def test_sets_of_two_checkpoints_are_not(tmp_path: Path) -> None:
    """Two fine-tunes of one model: their headers and config.json are alike."""
    for name, seed in (("one", 0), ("other", 1)):
        build(tmp_path / name, replace(Model(), seed=seed))
    for key, source in (("o_proj", "one"), ("lm_head", "other")):
        split(tmp_path / source, tmp_path / "parts" / key, cut(key, 2))
    done = reshard("merge", tmp_path / "parts", tmp_path / "merged", "--quiet")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "lm_head and o_proj were cut from other (folder) and from one (folder): a checkpoint is put" in done.err
    assert not (tmp_path / "merged").exists()


def test_a_set_of_a_file_that_was_replaced_is_not(tmp_path: Path) -> None:
    build(tmp_path / "source", Model())
    split(tmp_path / "source", tmp_path / "parts/lm_head", cut("lm_head", 2))
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    (tmp_path / "source").rmdir()
    build(tmp_path / "source", Model(attention=512))
    split(tmp_path / "source", tmp_path / "parts/embedding", cut("embedding", 2))
    done = reshard("merge", tmp_path / "parts", tmp_path / "merged", "--quiet")
    assert done.code == 1
    assert "of lm_head and of embedding differ" in done.err or ", with two model-0000" in done.err
