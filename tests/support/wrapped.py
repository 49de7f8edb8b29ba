"""Small random models of transformers, float32: wrappers of a language model, and MLPs with gate and up stacked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.builders import read_safetensors, write_safetensors

HIDDEN, INTERMEDIATE, VOCABULARY = 256, 512, 256
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "initializer_range": HIDDEN**-0.5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Every token goes to all experts: none that a rounding can send to others.
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# The tower's MLP has the language model's sizes.
_TOWER: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
_IMAGES = {"patch_size": 14, "image_size": 28}


@dataclass(frozen=True)
class Case:
    """`prefix`: of the files' names. `layers`: where they are in the model. `tower`: of its parts' names there."""

    make: Callable[[], Any]
    prefix: str
    layers: str
    dense: tuple[int, ...] = (0, 1)
    stacked: bool = False
    tower: str | None = None

    def write(self, folder: Path) -> Path:
        """The model's folder, its names as those of published files."""
        torch.manual_seed(0)
        self.make().save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # transformers 5.23 writes Kimi's layers as blocks
            tensors = read_safetensors(path)
            renamed = {
                name.replace("language_model.model.blocks.", self.prefix + "layers."): raw
                for name, raw in tensors.items()
            }
            write_safetensors(path, renamed, {"format": "pt"})
        return folder


def _glm4v(kind: str, **more: Any) -> Any:
    text = {**_SIZES, **more, "rope_parameters": {**_ROPE, "mrope_section": [8, 4, 4]}}
    tower = {**_TOWER, **_IMAGES, "depth": 1, "num_heads": 4, "out_hidden_size": HIDDEN}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=tower)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _kimi_k25() -> Any:
    tower = {**_TOWER, "num_hidden_layers": 1, "num_attention_heads": 4, "pos_emb_height": 8, "pos_emb_width": 8}
    text = {**_SIZES, **_EXPERTS, **_LATENT, "model_type": "deepseek_v3"}
    config = transformers.Kimi_K25Config(text_config=text, vision_config=tower, tie_word_embeddings=False)
    return transformers.Kimi_K25ForConditionalGeneration(config)


def _mistral3() -> Any:
    tower = {**_TOWER, **_IMAGES, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Mistral3Config(text_config={**_SIZES, "model_type": "mistral"}, vision_config=tower)
    return transformers.Mistral3ForConditionalGeneration(config)


def _qwen3_5() -> Any:
    text = {
        **_SIZES, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 64,
        "rope_parameters": {**_ROPE, "mrope_section": [8, 4, 4], "mrope_interleaved": True},
    }  # fmt: skip
    tower = {**_TOWER, "patch_size": 14, "depth": 1, "num_heads": 4, "out_hidden_size": HIDDEN}
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=text, vision_config=tower)
    )


def llama4() -> Any:
    """Its layers call the MLP feed_forward."""
    sizes = {**_SIZES, "intermediate_size_mlp": INTERMEDIATE, "num_local_experts": 2, "moe_layers": [1]}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))


def bitnet() -> Any:
    """Its MLP has a norm between its matrices."""
    return transformers.BitNetForCausalLM(transformers.BitNetConfig(**_SIZES))


_INSIDE = "model.language_model.layers"
CASES = {
    "Kimi K2.5": Case(_kimi_k25, "language_model.model.", _INSIDE, (0,), tower="model.vision_tower."),
    "GLM-4.5V": Case(
        lambda: _glm4v("Glm4vMoe", **_EXPERTS), "model.language_model.", _INSIDE, (0,), tower="model.visual."
    ),
    "GLM-4.1V": Case(lambda: _glm4v("Glm4v"), "model.language_model.", _INSIDE, stacked=True, tower="model.visual."),
    "Mistral 3": Case(_mistral3, "language_model.model.", _INSIDE, tower="model.vision_tower."),
    "Qwen3.5": Case(_qwen3_5, "model.language_model.", _INSIDE, tower="model.visual."),
    "Phi-3": Case(
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_SIZES)), "model.", "model.layers", stacked=True
    ),
    "GLM-4-0414": Case(
        lambda: transformers.Glm4ForCausalLM(transformers.Glm4Config(**_SIZES, head_dim=64)),
        "model.",
        "model.layers",
        stacked=True,
    ),
}
