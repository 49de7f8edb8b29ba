"""Where config.json keeps the language model: at its top, or under a key of its own beside vision and speech."""

from collections.abc import Mapping
from typing import Any

_LAYERS = "num_hidden_layers"
# The path of the nested config, and who writes it so.
_WRAPPERS: dict[tuple[str, ...], str] = {
    ("text_config",): "transformers' own: Kimi K2.5 and K3, GLM-4.5V, Qwen3.5, Llama 4, Mistral 3, Gemma 3",
    ("language_config",): "DeepSeek-VL2, DeepSeek-OCR",
    ("llm_config",): "InternVL, Phi-4 multimodal",
    ("thinker_config", "text_config"): "Qwen2.5-Omni, Qwen3-Omni",
}


def language_config(config: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(the key under which the language model's config is nested, that config); (None, config) where it is not.

    A nested key is spelt with dots: "thinker_config.text_config". Sizes at the top go before nested ones.
    """
    if config.get(_LAYERS) is None:
        for path in _WRAPPERS:
            nested: Any = config
            for key in path:
                nested = nested.get(key) if isinstance(nested, Mapping) else None
            if isinstance(nested, Mapping) and nested.get(_LAYERS) is not None:
                return ".".join(path), dict(nested)
    return None, dict(config)
