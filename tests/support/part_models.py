"""Small checkpoints with every part that is split, made without any of reshard's code: attention, a vocabulary, an MTP
layer with tables and an o_proj of its own, and modules whose names are near to the parts'.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.builders import RECIPES, Raw, linear, random_raw, write_safetensors

HEAD_SIZE, INTERMEDIATE = 32, 256
KEYS = ("denseffn", "lm_head", "embedding", "o_proj")

WRAPPERS = {
    "model.": "",
    "language_model.model.": "kimi_k25",
    "model.language_model.": "glm4v_moe",
}
"""The prefix of a language model's layers, and the wrapper's model_type."""


@dataclass(frozen=True)
class Model:
    """A dense layer, a MoE layer, an MTP layer. Recipes (see RECIPES): of o_proj and DenseFFN, and of each table.

    attention: all heads' values. latent: whether attention is DeepSeek's MLA, else grouped as GLM-4.5's. prefix: of the
    layers' names. tied: what config.json says, if anything. computable: see builders.Spec.
    """

    recipe: str = "bf16"
    hidden: int = 128
    attention: int = 256
    vocabulary: int = 100
    latent: bool = True
    prefix: str = "model."
    head: str = "bf16"
    embedding: str = "bf16"
    tied: bool | None = False
    files: int = 2
    index: bool = True
    seed: int = 0
    computable: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def lm_head(self) -> str:
        """The LM head's name: beside what holds the layers and the embedding."""
        return {"language_model.model.": "language_model.lm_head"}.get(self.prefix, "lm_head")

    @property
    def recipes(self) -> dict[str, str]:
        """By the names of modules that may be quantized."""
        named = [f"layers.{layer}.self_attn.o_proj" for layer in (0, 1, 2)]
        named += [f"layers.0.mlp.{role}_proj" for role in ("gate", "up", "down")]
        quantized = {f"{self.prefix}{name}": self.recipe for name in named}
        return {**quantized, self.lm_head: self.head, f"{self.prefix}embed_tokens": self.embedding}

    def names(self, key: str) -> str:
        """A pattern of the names of a part's tensors, by hand."""
        prefix = re.escape(self.prefix)
        return {
            "denseffn": rf"{prefix}layers\.0\.mlp\.(gate|up|down)_proj\.\w+",
            "lm_head": rf"{re.escape(self.lm_head)}\.\w+",
            "embedding": rf"{prefix}embed_tokens\.\w+",
            "o_proj": rf"{prefix}layers\.[01]\.self_attn\.o_proj\.\w+",
        }[key]

    def of(self, key: str, tensors: dict[str, Raw]) -> dict[str, Raw]:
        """A part's tensors among all."""
        return {name: raw for name, raw in tensors.items() if re.fullmatch(self.names(key), name)}


def tensors_of(model: Model) -> dict[str, Raw]:
    """Every tensor, by name."""
    rng = np.random.default_rng(model.seed)
    found: dict[str, Raw] = {}

    def plain(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = random_raw(rng, "BF16", shape)

    def made(module: str, recipe: str, out: int, in_: int) -> None:
        found.update(linear(rng, RECIPES[recipe], module, out, in_, model.computable))

    made(f"{model.prefix}embed_tokens", model.embedding, model.vocabulary, model.hidden)
    for layer in (0, 1, 2):  # dense, MoE, MTP
        prefix = f"{model.prefix}layers.{layer}"
        plain(f"{prefix}.input_layernorm", model.hidden)  # before attention, as names are sorted
        for name in ("q_a_proj", "kv_b_proj") if model.latent else ("q_proj", "k_proj"):
            plain(f"{prefix}.self_attn.{name}", 8, model.hidden)
        made(f"{prefix}.self_attn.o_proj", model.recipe, model.hidden, model.attention)
        if layer == 0:
            for role in ("gate_proj", "up_proj"):
                made(f"{prefix}.mlp.{role}", model.recipe, INTERMEDIATE, model.hidden)
            for suffix, (_, rule) in RECIPES[model.recipe].tensors.items():
                if rule == "1":  # what the fused layout holds once
                    found[f"{prefix}.mlp.up_proj.{suffix}"] = found[f"{prefix}.mlp.gate_proj.{suffix}"]
            made(f"{prefix}.mlp.down_proj", model.recipe, model.hidden, INTERMEDIATE)
        else:
            for role in ("gate_proj", "up_proj", "down_proj"):
                plain(f"{prefix}.mlp.experts.0.{role}", 8, 8)
            plain(f"{prefix}.mlp.gate", 2, model.hidden)
        if layer == 2:
            plain(f"{prefix}.eh_proj", model.hidden, 2 * model.hidden)
            plain(f"{prefix}.embed_tokens", model.vocabulary, model.hidden)
            plain(f"{prefix}.shared_head.head", model.vocabulary, model.hidden)
    plain(f"{model.prefix}norm", model.hidden)
    made(model.lm_head, model.head, model.vocabulary, model.hidden)
    return found


def config_of(model: Model) -> dict[str, Any]:
    """The config.json that goes with it."""
    heads = model.attention // HEAD_SIZE
    language: dict[str, Any] = {
        "model_type": "deepseek_v3" if model.latent else "glm4_moe",
        "hidden_size": model.hidden,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": model.vocabulary,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "first_k_dense_replace": 1,
        "n_routed_experts": 1,
        "num_nextn_predict_layers": 1,
        "torch_dtype": "bfloat16",
        **({"kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": HEAD_SIZE} if model.latent else {"head_dim": HEAD_SIZE}),
        **({} if model.tied is None else {"tie_word_embeddings": model.tied}),
        **model.config,
    }
    section = RECIPES[model.recipe].quantization_config
    if section is not None:
        language["quantization_config"] = section
    wrapper = WRAPPERS[model.prefix]
    return {"model_type": wrapper, "text_config": language} if wrapper else language


def build(folder: Path, model: Model, **more: Raw | None) -> dict[str, Raw]:
    """Write the checkpoint into a new folder. more: tensors beside its own, or None to leave one out."""
    tensors = {name: raw for name, raw in (tensors_of(model) | more).items() if raw is not None}
    write(folder, model, tensors)
    return tensors


def write(folder: Path, model: Model, tensors: dict[str, Raw]) -> None:
    """These tensors, dealt to files in turn, with the model's config and what describes them."""
    folder.mkdir(parents=True)
    names = [f"model-{number:05d}-of-{model.files:05d}.safetensors" for number in range(1, model.files + 1)]
    homes = {name: names[place % model.files] for place, name in enumerate(tensors)}
    for file in names:
        held = {name: raw for name, raw in tensors.items() if homes[name] == file}
        write_safetensors(folder / file, held, {"format": "pt"})
    if model.index:
        index = {"metadata": {}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    kinds = {module: RECIPES[recipe].description for module, recipe in model.recipes.items()}
    if any(kinds.values()):
        types: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC"}
        types |= {name: kinds.get(name.rpartition(".")[0]) or "FLOAT" for name in tensors}
        (folder / "quant_model_description.json").write_text(json.dumps(types))
