"""The sizes of transformers' config classes, where a nested config leaves them out.

A wrapper's save_pretrained writes of its text_config only what differs from the class's defaults (LLaVA 1.5,
DeepSeek-VL). tests/model/test_families.py compares them with the classes.
"""

from collections.abc import Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.model.naming import CONFIG

_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size")
_SIZES = {
    (12, 1_280, 6_848): "unlimited_ocr_text",
    (16, 1_024, 4_096): "glm_ocr_text",
    (16, 2_048, 8_192): "diffllama",
    (18, 1_024, 3_072): "paddleocr_vl_text ernie4_5",
    (24, 2_048, 5_632): "qwen2_moe qwen3_vl_moe_text",
    (24, 2_048, 6_144): "qwen3_moe",
    (24, 2_560, 7_040): "helium",
    (24, 2_560, 8_192): "granite_swa",
    (26, 2_304, 9_216): "gemma2 gemma3_text vaultgemma",
    (27, 2_304, 9_216): "kimi_linear",
    (28, 1_024, 2_048): "granite_docling_text",
    (28, 2_048, 18_944): "qwen3_omni_moe_text",
    (28, 2_304, 7_168): "mellum",
    (28, 2_560, 12_288): "ernie4_5_moe ernie4_5_vl_moe_text",
    (28, 3_072, 8_192): "higgs_audio_v2",
    (28, 3_072, 24_576): "gemma",
    (28, 3_584, 18_944): "qwen2_5_omni_text",
    (30, 2_304, 9_216): "gemma4_text gemma4_unified_text",
    (30, 2_560, 6_912): "bitnet",
    (32, 2_048, 6_144): "youtu afmoe",
    (32, 2_560, 6_912): "stablelm",
    (32, 3_072, 8_192): "phi3 phi4_multimodal",
    (32, 3_840, 11_008): "olmo_hybrid",
    (32, 4_096, 11_008): (
        "granite hyperclovax llama olmo olmo2 olmo3 hunyuan_v1_dense hunyuan_vl_text deepseek_v2 deepseek_ocr2_text"
    ),
    (32, 4_096, 12_288): "qwen3_5_text",
    (32, 4_096, 14_336): "emu3_text_model ministral mistral voxtral_realtime_text",
    (32, 4_096, 16_384): "exaone4 exaone_moe",
    (32, 4_096, 22_016): "qwen2 qwen3 qwen3_vl_text",
    (34, 2_816, 6_912): "hy_v4",
    (34, 4_096, 14_336): "ministral3",
    (35, 2_048, 16_384): "gemma3n_text",
    (36, 2_048, 11_008): "smollm3",
    (36, 4_096, 12_288): "molmo2_text mistral4",
    (40, 2_048, 8_192): "laguna",
    (40, 4_096, 13_696): "glm glm4 glm4v_text glm_image_text",
    (40, 4_096, 14_336): "mllama_text_model",
    (40, 8_192, 22_528): "cohere cohere2 cohere2_moe",
    (42, 2_560, 6_144): "bailing_hybrid",
    (45, 4_096, 11_264): "step3p5",
    (45, 4_096, 12_288): "glm5_next_text",
    (46, 4_096, 10_944): "glm4_moe glm4v_moe_text",
    (46, 5_120, 13_824): "dots3_note_text",
    (47, 2_048, 10_240): "glm4_moe_lite",
    (48, 2_048, 5_120): "axk2",
    (48, 2_048, 5_632): "qwen3_next",
    (48, 4_096, 10_240): "internlm3",
    (48, 4_096, 16_384): "mimo_v2_flash",
    (49, 2_048, 6_144): "flint",
    (52, 5_120, 20_480): "beam",
    (52, 6_656, 19_968): "muse_glimmer_text",
    (60, 6_144, 3_072): "minimax_m3_vl_text",
    (61, 7_168, 18_432): "deepseek_v3 deepseek_v32 axk1",
    (62, 2_560, 6_400): "minicpm3",
    (62, 4_608, 10_944): "dots1",
    (62, 8_192, 16_384): "muse_spark_text",
    (64, 4_096, 27_648): "seed_oss",
    (64, 6_144, 21_504): "cwm",
    (72, 6_144, 24_576): "mistral_large4_text",
    (78, 6_144, 12_288): "glm_moe_dsa",
    (80, 4_096, 13_312): "hy_v3",
    (80, 5_120, 27_648): "iquestcoder",
    (80, 8_192, 29_568): "qwen2_5_vl_text qwen2_vl_text",
}
"""Layers, hidden_size, intermediate_size: the model types."""

DEFAULTS = {
    model_type: dict(zip(_KEYS, sizes, strict=True)) for sizes, types in _SIZES.items() for model_type in types.split()
}


def with_default_sizes(nested: Mapping[str, Any], wrapper: str) -> tuple[dict[str, Any], str | None]:
    """(a nested config with its class's sizes where it has none, a line that names them).

    Raises SourceError where the class's are not known.
    """
    model_type = nested.get("model_type")
    defaults = DEFAULTS.get(model_type, {}) if isinstance(model_type, str) else {}
    absent = [key for key in _KEYS if nested.get(key) is None]
    unknown = [key for key in absent if key not in defaults and key != "intermediate_size"]
    if unknown:
        raise SourceError(
            f"{CONFIG}: {wrapper} has no {' and no '.join(unknown)}, and the defaults of model_type {model_type!r} are "
            "not known here; write the model's there"
        )
    taken = {key: defaults[key] for key in absent if key in defaults}
    if not taken:
        return dict(nested), None
    said = ", ".join(f"{key} {value}" for key, value in taken.items())
    return {**nested, **taken}, f"{CONFIG}: {wrapper} does not say {said}: the defaults of {model_type} are taken"
