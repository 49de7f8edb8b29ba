"""The models of `configs/`: which layers of each are dense, written by hand, and the frozen names of split tensors."""

import json

from tests.support.paths import CONFIGS, DATA

FROZEN: dict[str, dict[str, list[str]]] = json.loads((DATA / "split_tensors.json").read_text())
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))

TABLES = {
    "deepseek-r1": ("lm_head", "model.embed_tokens", 129280, 7168),
    "deepseek-v2-lite": ("lm_head", "model.embed_tokens", 102400, 2048),
    "deepseek-v3": ("lm_head", "model.embed_tokens", 129280, 7168),
    "glm-4.5": ("lm_head", "model.embed_tokens", 151552, 5120),
    "glm-4.5v": ("lm_head", "model.language_model.embed_tokens", 151552, 4096),
    "kimi-k2": ("lm_head", "model.embed_tokens", 163840, 7168),
    "kimi-k2.5": ("language_model.lm_head", "language_model.model.embed_tokens", 163840, 7168),
    "llama-3.1-8b": ("lm_head", "model.embed_tokens", 128256, 4096),
}
"""The LM head's name, the embedding's, and the shape of both, as published."""

O_PROJ = {
    "deepseek-r1": ("model.layers.{}.self_attn.o_proj", 61, 7168, 16384),
    "deepseek-v2-lite": ("model.layers.{}.self_attn.o_proj", 27, 2048, 2048),
    "deepseek-v3": ("model.layers.{}.self_attn.o_proj", 61, 7168, 16384),
    "glm-4.5": ("model.layers.{}.self_attn.o_proj", 92, 5120, 12288),
    "glm-4.5v": ("model.language_model.layers.{}.self_attn.o_proj", 46, 4096, 12288),
    "kimi-k2": ("model.layers.{}.self_attn.o_proj", 61, 7168, 8192),
    "kimi-k2.5": ("language_model.model.layers.{}.self_attn.o_proj", 61, 7168, 8192),
    "llama-3.1-8b": ("model.layers.{}.self_attn.o_proj", 32, 4096, 4096),
}
"""The name of each layer's o_proj, the number of layers without MTP layers, and its shape, as published."""

DENSE_LAYERS = {
    "deepseek-r1": [0, 1, 2],
    "deepseek-v2-lite": [0],
    "deepseek-v3": [0, 1, 2],
    "glm-4.5": [0, 1, 2],
    "glm-4.5v": [0],
    "kimi-k2": [0],
    "kimi-k2.5": [0],
    "llama-3.1-8b": [
        *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        *(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
    ],
}
