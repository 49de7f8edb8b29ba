"""Where a checkpoint has its LM head, its embedding and its o_proj: what is taken, left alone, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.config_only import config_checkpoint
from reshard.checkpoint.description import Checkpoint
from reshard.errors import LayersError, ReshardError, SchemeError, ShapesError, SourceError
from reshard.model.parts import PARTS
from reshard.source.open import describe, open_source
from tests.support.builders import Raw
from tests.support.part_models import WRAPPERS, Model, build, config_of, tensors_of
from tests.support.running import reshard

O_PROJ = "model.layers.{}.self_attn.o_proj.weight"
INDEX = "model.safetensors.index.json"


def bf16(*shape: int) -> Raw:
    size = 2
    for length in shape:
        size *= length
    return "BF16", shape, bytes(size)


def described(folder: Path, key: str) -> Checkpoint:
    with open_source(str(folder)) as source:
        return describe(source, part=PARTS[key])


def names(checkpoint: Checkpoint) -> list[str]:
    return sorted(tensor.name for tensor in checkpoint.tensors())


# --- taken ---


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("latent", [True, False])
def test_no_other_tensor_is_taken(tmp_path: Path, prefix: str, latent: bool) -> None:
    """Neither an expert's nor an MTP layer's tables and o_proj, nor a tower's."""
    model = Model(latent=latent, prefix=prefix)
    tower = "visual.blocks" if prefix == "model.language_model." else "vision_tower.encoder.layers"
    beside = {
        f"{tower}.0.self_attn.o_proj.weight": bf16(128, 256),
        f"{tower}.0.mlp.down_proj.weight": bf16(128, 256),
        "vision_tower.embed_tokens.weight": bf16(100, 128),
        "vision_tower.lm_head.weight": bf16(100, 128),
        "mtp.embed_tokens.weight": bf16(100, 128),
        "mtp.layers.0.self_attn.o_proj.weight": bf16(128, 256),
        f"{model.lm_head}_norm.weight": bf16(128),
    }
    build(tmp_path / "model", model, **(beside if WRAPPERS[prefix] else {}))
    head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
    assert names(described(tmp_path / "model", "lm_head")) == [f"{head}.weight"]
    assert names(described(tmp_path / "model", "embedding")) == [f"{prefix}embed_tokens.weight"]
    found = described(tmp_path / "model", "o_proj")
    assert names(found) == [f"{prefix}layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)]
    assert found.warnings == ("the o_proj of the MTP layer 2 is left alone: it is no part of the decoder's o_proj",)
    assert found.model.attention_size == 256
    assert found.model.prefix == prefix


@pytest.mark.parametrize(
    ("key", "other", "taken"),
    [
        ("lm_head", "lm_head", "language_model.lm_head"),
        ("embedding", "embed_tokens", "language_model.model.embed_tokens"),
        ("embedding", "other.embed_tokens", "language_model.model.embed_tokens"),
    ],
)
def test_of_two_the_one_beside_the_layers(tmp_path: Path, key: str, other: str, taken: str) -> None:
    build(tmp_path / "model", Model(prefix="language_model.model."), **{f"{other}.weight": bf16(100, 128)})
    assert names(described(tmp_path / "model", key)) == [f"{taken}.weight"]


def test_a_layer_with_another_kind_of_attention_is_left_alone(tmp_path: Path) -> None:
    attention = [name for name in tensors_of(Model()) if name.startswith("model.layers.1.self_attn.")]
    other = {"model.layers.1.linear_attn.out_proj.weight": bf16(128, 256)}
    build(tmp_path / "model", Model(), **dict.fromkeys(attention), **other)
    found = described(tmp_path / "model", "o_proj")
    assert names(found) == [O_PROJ.format(0)]
    assert found.warnings[0] == "without self_attn, and left alone: layer 1"


@pytest.mark.parametrize("key", ["lm_head", "embedding", "o_proj"])
def test_the_config_alone_promises_the_same(tmp_path: Path, key: str) -> None:
    for number, model in enumerate((Model(), Model(prefix="language_model.model."), Model(latent=False))):
        build(tmp_path / str(number), model)
        whole = described(tmp_path / str(number), key)
        promised = config_checkpoint(config_of(model), "config.json", part=PARTS[key])
        assert names(promised) == names(whole)
        assert promised.model == whole.model
        shapes = [{t.name: (t.dtype, t.shape) for t in one.tensors()} for one in (promised, whole)]
        assert shapes[0] == shapes[1]


# --- tied embeddings ---


def at_top(value: bool) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(tie_word_embeddings=value)


IS_TIED = r"^config.json: tie_word_embeddings is set: the LM head is the embedding, which --part embedding cuts$"
WRAPPED = "language_model.model."
TIED: dict[str, tuple[Model, Callable[[dict[str, Any]], None] | None, str | None]] = {
    "tied": (Model(tied=True), None, IS_TIED),
    "tied in the language model's": (Model(tied=True, prefix=WRAPPED), None, IS_TIED),
    "tied at the top": (Model(tied=None, prefix=WRAPPED), at_top(True), IS_TIED),
    "tied at both": (Model(tied=True, prefix=WRAPPED), at_top(True), IS_TIED),
    "at the top alone": (Model(tied=False, prefix=WRAPPED), at_top(True), "contradicts itself: tie_word_embeddings"),
    "below alone": (Model(tied=True, prefix=WRAPPED), at_top(False), "contradicts itself: tie_word_embeddings"),
    "untied": (Model(tied=False), None, None),
    "untied at both": (Model(tied=False, prefix=WRAPPED), at_top(False), None),
    "not said": (Model(tied=None), None, None),
}


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(tmp_path: Path, name: str, in_file: bool) -> None:
    """An engine does not read the head of a tied model; whether the files hold one changes nothing."""
    model, change, says = TIED[name]
    build(tmp_path / "model", model, **({} if in_file else {f"{model.lm_head}.weight": None}))
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    if change is not None:
        change(config)
        path.write_text(json.dumps(config))
    assert names(described(tmp_path / "model", "embedding")) == [f"{model.prefix}embed_tokens.weight"]
    if says is None and in_file:
        assert names(described(tmp_path / "model", "lm_head")) == [f"{model.lm_head}.weight"]
        return
    with pytest.raises(LayersError, match=says or "^no LM head: no tensor is named …lm_head.weight$"):
        described(tmp_path / "model", "lm_head")
    if says is not None:
        with pytest.raises(LayersError, match=says):
            config_checkpoint(config, "config.json", part=PARTS["lm_head"])


# --- refused ---

Beside = dict[str, Raw | None]
OTHERS: Beside = {"other.embed_tokens.weight": bf16(100, 128), "other.lm_head.weight": bf16(100, 128)}
REFUSED: dict[str, tuple[str, Model, Beside, type[ReshardError], str]] = {
    # The norm's name comes before those of attention, as files have it.
    "a layer lacks it": (
        "o_proj", Model(), {O_PROJ.format(1): None}, LayersError,
        r"^model.layers.1.self_attn.o_proj.weight: missing; download the file that holds it again$",
    ),
    "a layer lacks it and another has no attention": (
        "o_proj",
        Model(),
        {O_PROJ.format(1): None, **{name: None for name in tensors_of(Model()) if "0.self_attn." in name}},
        LayersError,
        r"^model.layers.1.self_attn.o_proj.weight: missing",
    ),
    "a layer is not there": (
        "o_proj", Model(), {name: None for name in tensors_of(Model()) if ".layers.1." in name}, LayersError,
        r"^model.layers.1.self_attn.o_proj.weight: missing",
    ),
    "no layer has attention": (
        "o_proj",
        Model(),
        {name: None for name in tensors_of(Model()) if "0.self_attn." in name or "1.self_attn." in name},
        LayersError, r"^no o_proj: only the MTP layer 2 has one$",
    ),
    "nothing has it": (
        "o_proj", Model(), {O_PROJ.format(layer): None for layer in (0, 1, 2)}, LayersError,
        r"^no o_proj: no tensor of a language model is named …layers.\{i\}.self_attn.o_proj.weight$",
    ),
    "o_proj with a bias": (
        "o_proj", Model(), {O_PROJ.format(1).replace("weight", "bias"): bf16(128)}, SchemeError,
        r"^model.layers.1.self_attn.o_proj.bias in model-0000\d-of-00002.safetensors: not a tensor of bf16",
    ),
    "what is below o_proj": (
        "o_proj", Model(), {"model.layers.1.self_attn.o_proj.lora_A.weight": bf16(4, 256)}, SchemeError,
        r"^model.layers.1.self_attn.o_proj.lora_A.weight: below o_proj, and not a tensor that",
    ),
    "what is below the head": (
        "lm_head", Model(), {"lm_head.lora_A.weight": bf16(4, 256)}, SchemeError,
        r"^lm_head.lora_A.weight: below LM head, and not a tensor that the table of schemes knows",
    ),
    "an LM head with a bias": (
        "lm_head", Model(), {"lm_head.bias": bf16(100)}, SchemeError,
        r"^lm_head.bias in model-.*: not a tensor of bf16",
    ),
    "another module's head alone": (
        "lm_head", Model(), {**OTHERS, "lm_head.weight": None}, LayersError,
        r"^no LM head: other.lm_head is another module's, the language model's layers are model.layers.\*$",
    ),
    "another module's table alone": (
        "embedding", Model(), {**OTHERS, "model.embed_tokens.weight": None}, LayersError,
        r"^no embedding: other.embed_tokens is another module's, the language model's layers are model.layers.\*$",
    ),
    "two tables of other modules": (
        "embedding",
        Model(),
        {**OTHERS, "a.embed_tokens.weight": bf16(100, 128), "model.embed_tokens.weight": None},
        LayersError,
        r"^a.embed_tokens and other.embed_tokens: which is the language model's cannot be told; give a checkpoint that",
    ),
    "a vocabulary of another size": (
        "embedding", Model(config={"vocab_size": 104}), {}, ShapesError,
        r"^model.embed_tokens.weight in .*: embed_tokens has shape \[100, 128\], config.json makes it \[104, 128\]",
    ),
    "heads of another size": (
        "o_proj", Model(config={"v_head_dim": 16}), {}, ShapesError,
        r"^model.layers.0.self_attn.o_proj.weight in .* has shape \[128, 256\], config.json makes it \[128, 128\]",
    ),
    "one layer of another size": (
        "o_proj", Model(), {O_PROJ.format(1): bf16(128, 128)}, ShapesError,
        r"^model.layers.1.self_attn.o_proj.weight in .* has shape \[128, 128\], config.json makes it \[128, 256\]",
    ),
    "a head that nothing declares": (
        "lm_head", Model(head="modelslim_dynamic", config={"quantization_config": None}), {}, SchemeError, "^lm_head",
    ),
    "a head that is declared left alone": (
        "lm_head", Model("ct_fp8_channel", head="ct_fp8_channel"), {}, SchemeError,
        r"^lm_head: config.json \(quantization_config.ignore\) says bf16, and its tensors .* are fp8_channel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    key, model, beside, error, says = REFUSED[name]
    build(tmp_path / "model", model, **beside)
    if name == "a head that nothing declares":
        (tmp_path / "model/quant_model_description.json").unlink()
    with pytest.raises(error, match=says) as caught:
        described(tmp_path / "model", key)
    assert len(str(caught.value).splitlines()) == 1


def test_a_family_whose_heads_are_not_known(tmp_path: Path) -> None:
    """A tower without an o_proj of its own must not pass for the language model."""
    model = Model(config={"model_type": "unheard_of"})
    build(
        tmp_path / "model", model, **{"other.layers.0.attn.out.weight": bf16(8, 8), "other.layers.0.w.weight": bf16(8)}
    )
    assert names(described(tmp_path / "model", "o_proj")) == [O_PROJ.format(layer) for layer in (0, 1)]


# --- downloads in parts ---


@pytest.mark.parametrize("key", ["lm_head", "embedding", "o_proj"])
def test_a_file_that_is_missing(tmp_path: Path, key: str) -> None:
    """With an index it is known what was in it; without one whether something is lacking."""
    model = Model(files=4)
    tensors = build(tmp_path / "model", model)
    homes: dict[str, str] = json.loads((tmp_path / "model" / INDEX).read_text())["weight_map"]
    wanted = set(model.of(key, tensors))
    for file in sorted(set(homes.values())):
        for indexed in (True, False):
            folder = Path(shutil.copytree(tmp_path / "model", tmp_path / f"{file}-{indexed}"))
            (folder / file).unlink()
            if not indexed:
                (folder / INDEX).unlink()
            if wanted & {name for name, home in homes.items() if home == file}:
                with pytest.raises(
                    (SourceError, LayersError), match=rf"{file} (is missing|to)|which is missing"
                ) as caught:
                    described(folder, key)
                assert "dense" not in str(caught.value)
                continue
            found = described(folder, key)
            assert set(names(found)) == wanted
            lost = "none of o_proj" if key == "o_proj" else f"none of the {PARTS[key].name}"
            every = "every o_proj that config.json names is in the others" if key == "o_proj" else "is in the others"
            assert any((lost if indexed else every) in line for line in found.warnings), found.warnings
            assert not any("dense" in line for line in found.warnings)


def test_attention_that_may_be_in_the_missing_file(tmp_path: Path) -> None:
    """All of layer 1's is in the one that is missing, and no index says so."""
    attention = {name: raw for name, raw in tensors_of(Model()).items() if name.startswith("model.layers.1.self_attn.")}
    model = Model(files=1, index=False)
    build(tmp_path / "model", model, **dict.fromkeys(attention))
    (tmp_path / "model/model-00001-of-00001.safetensors").rename(tmp_path / "model/model-00001-of-00002.safetensors")
    with pytest.raises(
        SourceError, match=r"model-00002-of-00002.safetensors is missing, .*: self_attn of layer 1 may be there"
    ):
        described(tmp_path / "model", "o_proj")


# --- what is said of --scheme ---


def test_a_scheme_that_the_tables_do_not_have(tmp_path: Path) -> None:
    """It is said of all that is cut, and no tool quantizes these: they are what they are."""
    build(tmp_path / "model", Model("modelslim_dynamic"))
    (tmp_path / "model/quant_model_description.json").unlink()
    parts = ("--part", "o_proj", "--part", "lm_head", "--part", "embedding", "--part", "denseffn")
    command = ("split", tmp_path / "model", tmp_path / "out", "--tp", 2, "--scheme", "w8a8_dynamic", *parts)
    done = reshard(*command, "--quiet", "--format", "json")
    assert done.code == 0, done.err
    assert [part["scheme"] for part in done.document["parts"]] == ["w8a8_dynamic", "bf16", "bf16", "w8a8_dynamic"]
    build(tmp_path / "plain", Model())
    done = reshard(
        "split", tmp_path / "plain", tmp_path / "no", "--tp", 2, "--part", "o_proj", "--scheme", "w8a8_dynamic"
    )
    assert "no o_proj is w8a8_dynamic: each is a plain float weight; leave the option out" in done.err
