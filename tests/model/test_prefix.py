"""Wrappers: the language model's layers are found under whatever prefix, and keep their names from file to file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard.errors import LayersError, SchemeError
from reshard.model.foreign import what_is_there
from reshard.model.naming import parse_tensor
from reshard.model.parts import DENSE_FFN
from reshard.source.open import describe, open_source
from tests.support.builders import Raw, Spec, config_of, random_raw, read_folder, tensors_of, write_safetensors
from tests.support.running import Done, reshard

ROLES = [role.name for role in DENSE_FFN.roles]

SPEC = Spec("bf16", hidden=64, intermediate=256)
PREFIXES = [
    "model.",
    "",
    "language_model.model.",
    "model.language_model.",
    "language.model.",
    "thinker.model.",
    "llm.model.",
]
TOWER = "vision_tower.encoder."


def run(*arguments: object, code: int = 0) -> Done:
    done = reshard(*arguments)
    assert done.code == code, done.err
    return done


def renamed(prefix: str) -> dict[str, Raw]:
    return {prefix + name.removeprefix("model."): value for name, value in tensors_of(SPEC).items()}


def mlp(prefix: str, hidden: int, intermediate: int, layers: int = 2) -> dict[str, Raw]:
    """Another module's SwiGLU layers."""
    rng = np.random.default_rng(7)
    shapes = {
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return {
        f"{prefix}layers.{layer}.mlp.{role}.weight": random_raw(rng, "BF16", shape)
        for layer in range(layers)
        for role, shape in shapes.items()
    }


def wrapped(config: dict[str, Any], key: str = "text_config") -> dict[str, Any]:
    return {"model_type": "a_wrapper", key: config, "vision_config": {"hidden_size": 32}}


def write(folder: Path, tensors: dict[str, Raw], config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_keep_their_prefix_from_checkpoint_to_shards_and_back(tmp_path: Path, prefix: str) -> None:
    tensors = renamed(prefix)
    source = write(tmp_path / "model", tensors, wrapped(config_of(SPEC)))
    shards, merged = tmp_path / "shards", tmp_path / "merged"
    run("split", source, shards, "--tp", 2)
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["model"]["prefix"] == prefix
    held = read_folder(shards)
    assert {f"{prefix}layers.0.mlp.gate_up_proj.weight", f"{prefix}layers.1.mlp.down_proj.weight"} <= held.keys()
    run("verify", shards, "--source", source)
    run("check", shards, "--tp", 2, "--against", source)
    run("merge", shards, merged)
    back = read_folder(merged)
    assert back == {name: value for name, value in tensors.items() if parse_tensor(name)}
    assert len(back) == 6
    run("split", shards, tmp_path / "again", "--tp", 4)
    run("verify", tmp_path / "again", "--source", source)


@pytest.mark.parametrize(
    "tower", [TOWER, "visual.", "model.vision_model.", "audio_tower.", "model.mtp.", "talker.model."]
)
def test_a_tower_of_the_same_sizes_is_never_the_language_model(tmp_path: Path, tower: str) -> None:
    tensors = renamed("language_model.model.")
    beside = mlp(tower, SPEC.hidden, SPEC.intermediate, layers=SPEC.dense)
    source = write(tmp_path / "model", tensors | beside, wrapped(config_of(SPEC)))
    with open_source(str(source)) as opened:
        checkpoint = describe(opened)
    assert checkpoint.model.prefix == "language_model.model."
    assert all(tensor.name.startswith("language_model.model.layers.") for tensor in checkpoint.tensors())


def test_a_tower_alone_is_no_language_model(tmp_path: Path) -> None:
    source = write(tmp_path / "model", mlp(TOWER, SPEC.hidden, SPEC.intermediate), config_of(SPEC))
    result = run("split", source, tmp_path / "out", "--tp", 2, code=1)
    assert (
        "no dense layer: no tensor of a language model is named …layers.{i}.mlp.{gate,up,down}_proj.weight"
        in result.err
    )
    assert f"{TOWER}layers.0.mlp.down_proj.weight is another module's, by its name" in result.err


def test_of_two_unknown_modules_the_one_of_the_configs_sizes_is_taken(tmp_path: Path) -> None:
    other = mlp("other.", SPEC.hidden, 128)
    source = write(tmp_path / "model", renamed("model.") | other, config_of(SPEC))
    with open_source(str(source)) as opened:
        assert describe(opened).model.prefix == "model."


@pytest.mark.parametrize(
    ("config", "why"),
    [(config_of(SPEC), "each has all that config.json says"), (None, "there is no config.json")],
)
def test_two_modules_that_both_may_be_it_are_refused(tmp_path: Path, config: dict[str, Any] | None, why: str) -> None:
    source = write(tmp_path / "model", renamed("model.") | renamed("other."), config)
    result = run("split", source, tmp_path / "out", "--tp", 2, code=1)
    assert f"2 modules have layers, model.layers.0.* and other.layers.0.*, and {why}" in result.err
    assert not (tmp_path / "out").exists()


LM = "language_model.model."
MOE = {**config_of(SPEC), "model_type": "a_model", "first_k_dense_replace": None}
PLAIN = {**config_of(SPEC), "num_hidden_layers": 2, "model_type": "qwen3", "n_routed_experts": 0}


def language(*rests: str, prefix: str = LM, layers: int = 2) -> dict[str, Raw]:
    """A module's layers, by what is in each."""
    raw = random_raw(np.random.default_rng(3), "BF16", (8, 8))
    return {f"{prefix}layers.{layer}.{rest}": raw for layer in range(layers) for rest in rests}


def prefix_of(tmp_path: Path, tensors: dict[str, Raw], config: dict[str, Any] | None) -> tuple[str, tuple[str, ...]]:
    with open_source(str(write(tmp_path / "model", tensors, config))) as opened:
        checkpoint = describe(opened)
    return checkpoint.model.prefix, checkpoint.warnings


BESIDE = mlp("some_module.", SPEC.hidden, SPEC.intermediate)
PACKED = [f"mlp.{role}.{suffix}" for role in ROLES for suffix in ("qweight", "qzeros", "scales")]


@pytest.mark.parametrize(
    ("beside", "config"),
    [(BESIDE, PLAIN), (BESIDE, None), (mlp("some.model.", SPEC.hidden, 128), PLAIN)],
)
def test_a_module_without_attention_or_of_other_sizes_is_not_it(
    tmp_path: Path, beside: dict[str, Raw], config: dict[str, Any] | None
) -> None:
    own = mlp(LM, SPEC.hidden, SPEC.intermediate) | language("self_attn.o_proj.weight")
    assert prefix_of(tmp_path, own | beside, config)[0] == LM


@pytest.mark.parametrize("config", [MOE, None])
@pytest.mark.parametrize("experts", ["mlp.experts.0.up_proj.weight", "block_sparse_moe.experts.0.w1.weight"])
def test_a_language_model_of_experts_alone_has_no_dense_layer_whatever_stands_beside_it(
    tmp_path: Path, experts: str, config: dict[str, Any] | None
) -> None:
    """A module beside it may have attention, too."""
    own = language("self_attn.o_proj.weight", experts, layers=3)
    beside = BESIDE | language("self_attn.o_proj.weight", prefix="some_module.")
    with pytest.raises(LayersError) as caught:
        prefix_of(tmp_path, own | beside, config)
    assert f"the language model's layers are {LM}layers.*, and those of some_module. are another module's" in str(
        caught.value
    )


def test_packed_weights_do_not_make_a_module_another_one(tmp_path: Path) -> None:
    """The weights of the language model are AWQ's, those of the module beside it plain and of its sizes."""
    own = language("self_attn.o_proj.weight", *PACKED)
    with pytest.raises(SchemeError, match=re.escape(f"{LM}layers.0.mlp.gate_proj: ") + r".* its tensors \(qweight"):
        prefix_of(tmp_path, own | BESIDE, PLAIN)


def test_a_module_that_does_not_reach_the_last_layer_is_not_it(tmp_path: Path) -> None:
    layers = {**PLAIN, "num_hidden_layers": 3}
    own = mlp(LM, SPEC.hidden, SPEC.intermediate, layers=3) | language("self_attn.o_proj.weight", layers=3)
    beside = BESIDE | language("self_attn.o_proj.weight", prefix="some_module.")
    assert prefix_of(tmp_path, own | beside, layers) == (LM, ())


def test_sizes_go_before_the_number_of_layers(tmp_path: Path) -> None:
    """The one that reaches the last layer has other sizes; that of the right ones lacks a dense layer."""
    own = mlp(LM, SPEC.hidden, SPEC.intermediate, layers=1) | language("self_attn.o_proj.weight", layers=1)
    beside = mlp("some_module.", SPEC.hidden, 128)
    with pytest.raises(LayersError) as caught:
        prefix_of(tmp_path, own | beside, PLAIN)
    assert "gives 0-1, the names give 0 " in str(caught.value)


def test_two_modules_with_attention_of_different_names_are_refused(tmp_path: Path) -> None:
    own = mlp("lm.", SPEC.hidden, SPEC.intermediate) | language("temporal_block.linear_x.weight", prefix="lm.")
    beside = mlp("sound_model.", SPEC.hidden, SPEC.intermediate) | language("self_attn.x.weight", prefix="sound_model.")
    with pytest.raises(
        LayersError, match=r"2 modules have layers, lm.layers.0.\* and sound_model.layers.0.\*, and each"
    ):
        prefix_of(tmp_path, own | beside, PLAIN)


@pytest.mark.parametrize("prefix", [LM, "vision_language_model.model.", "backbone.eagle_model.language_model.model."])
def test_dense_layers_alone_beside_a_whole_tower(tmp_path: Path, prefix: str) -> None:
    """Part of a download: of the language model only the dense layers' files are there."""
    tower = language("self_attn.o_proj.weight", "mlp.fc1.weight", prefix="sam.", layers=12)
    own = mlp(prefix, SPEC.hidden, SPEC.intermediate)
    assert prefix_of(tmp_path, own | tower, {**PLAIN, "num_hidden_layers": 2})[0] == prefix


@pytest.mark.parametrize(
    ("prefix", "config", "warns"),
    [
        ("model.", None, 0),
        (LM, None, 1),
        (LM, PLAIN, 0),
        ("some.model.", PLAIN, 1),
        (LM, {**MOE, "num_hidden_layers": 2}, 1),
    ],
)
def test_a_prefix_that_names_alone_tell_is_named(
    tmp_path: Path, prefix: str, config: dict[str, Any] | None, warns: int
) -> None:
    found, lines = prefix_of(tmp_path, mlp(prefix, SPEC.hidden, SPEC.intermediate), config)
    assert found == prefix
    assert [f"the language model is taken to be {prefix}layers.*" in line for line in lines].count(True) == warns


@pytest.mark.parametrize(
    "beside",
    ["tts.model.", "assistant.model.", "speculator.", "model.perceiver.", "model.resampler.", "qformer.", "q_former."],
)
def test_other_modules_alone_are_no_language_model(tmp_path: Path, beside: str) -> None:
    """Part of a download: the files of the language model are missing."""
    with pytest.raises(LayersError, match="no dense layer: no tensor of a language model is named"):
        prefix_of(tmp_path, mlp(beside, SPEC.hidden, SPEC.intermediate), PLAIN)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layers.0.feed_forward.w1.weight", "Mistral's and Meta's own names"),
        ("model.layers.0.mlp.gate_proj.base_layer.weight", "a LoRA adapter that is not merged"),
        ("model.layers.0.feed_forward.w1.weight", "an MLP named feed_forward.w1 to w3 (InternLM2, LFM2), which this"),
        (
            "language_model.model.layers.0.feed_forward.gate_proj.weight",
            "an MLP named feed_forward (Llama 4, Falcon-H1, Jamba), which this version does not cut",
        ),
        (
            "model.layers.0.mlp.gate_proj.lora_B.vision.weight",
            "Phi-4-multimodal's adapters, one for each kind of input",
        ),
        ("model.layers.0.mlp.language_mlp.gate_proj.weight", "CogVLM's two MLPs a layer"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "Megatron-Core's names; convert the checkpoint to Hugging Face"),
        ("transformer.h.0.mlp.gate_proj.weight", "layers named h instead of layers (TeleChat)"),
        ("transformer.h.0.mlp.c_fc_0.weight", "an MLP without gate_proj, up_proj and down_proj, which"),
        ("model.transformer.blocks.0.ff_proj.weight", "an MLP without gate_proj, up_proj and down_proj, which"),
        ("backbone.layers.0.mixer.up_proj.weight", "an MLP without a gate, named mixer (Nemotron-H)"),
        ("model.layers.0.mlp.gate_and_up_proj.weight", "gate and up stacked with up first (Hunyuan-Large)"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "MoE layers"),
        ("model.layers.0.feed_forward.experts.0.w1.weight", "MoE layers"),
        ("model.layers.0.mlps.0.gate_proj.weight", "LongCat's two MLPs a layer"),
        ("layers.0.ffn.w1.weight", "DeepSeek's own names (its inference/convert.py)"),
        ("layers.1.ffn.experts.0.w1.weight", "DeepSeek's own names, and MoE layers all of them"),
        ("ernie.layers.0.mlp.up_gate_proj.weight", "PaddlePaddle's names"),
        ("h.0.mlp.c_fc.weight", "an MLP without gate_proj"),
        ("model.layers.0.mlp.experts.0.gate_proj.weight", "MoE layers"),
    ],
)
def test_names_of_other_schools_are_told_by_name(tmp_path: Path, name: str, says: str) -> None:
    raw = random_raw(np.random.default_rng(0), "BF16", (32, 16))
    source = write(tmp_path / "model", {name: raw}, None)
    result = run("split", source, tmp_path / "out", "--tp", 2, code=1)
    assert f"the nearest is {name}: {says}" in result.err


def test_adapters_of_each_kind_of_input_are_not_to_be_merged() -> None:
    """Phi-4-multimodal's: the row on LoRA, which says merge_and_unload, is not theirs."""
    module = "model.layers.0.mlp.down_proj"
    said = what_is_there([f"{module}.base_layer.weight", f"{module}.lora_A.speech.weight"])
    assert "would change the model" in said
    assert "merge_and_unload" not in said


def test_a_tower_is_the_nearest_only_where_there_is_nothing_else() -> None:
    tower, experts = "model.visual.layers.0.mlp.fc1.weight", "model.layers.0.mlp.experts.0.up_proj.weight"
    assert what_is_there([tower, experts]) == f"; the nearest is {experts}: MoE layers"
    assert what_is_there([tower]).startswith(f"; the nearest is {tower}: an MLP without gate_proj")


def without(tensors: dict[str, Raw], *names: str) -> dict[str, Raw]:
    return {name: raw for name, raw in tensors.items() if not any(part in name for part in names)}


@pytest.mark.parametrize(
    ("model_type", "lacking", "says"),
    [
        (
            "nemotron",
            ".gate_proj.",
            "missing, as in every layer; the checkpoint has of layer 0 only down_proj.weight, up",
        ),
        (None, ".gate_proj.", "an MLP without a gate (Nemotron-4, Arcee), or with the gate in up_proj, which this"),
        ("nemotron", "0.mlp.gate_proj.", "up_proj.weight; download the file that holds it again"),
        ("llama", ".gate_proj.", "up_proj.weight; download the file that holds it again"),
    ],
)
def test_an_mlp_without_a_gate_is_no_damage(tmp_path: Path, model_type: str | None, lacking: str, says: str) -> None:
    """Nor is it one where some layer has a gate, or where the family's code has it."""
    config = {"model_type": model_type, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    source = write(tmp_path / "model", without(mlp("model.", 64, 256), lacking), config if model_type else None)
    result = run("split", source, tmp_path / "out", "--tp", 2, code=1)
    assert "model.layers.0.mlp.gate_proj.weight: missing" in result.err
    assert says in result.err
    assert ("download" in result.err) == ("download" in says)


def test_an_activation_with_weights_is_told_by_name(tmp_path: Path) -> None:
    raw = random_raw(np.random.default_rng(0), "BF16", (1,))
    tensors = without(mlp("model.", 64, 256), ".gate_proj.") | {"model.layers.1.mlp.act_fn.alpha_p": raw}
    result = run("split", write(tmp_path / "model", tensors, None), tmp_path / "out", "--tp", 2, code=1)
    assert "model.layers.1.mlp.act_fn.alpha_p: in a dense layer" in result.err
    assert "an activation with weights of its own (xIELU, Apertus)" in result.err
