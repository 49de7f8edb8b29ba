"""The model families that are known: what their code fixes and config.json may leave out. One line for each.

A family is told by the language model's `model_type`. tests/model/test_families.py compares every family that
transformers has with the modules and the outputs of transformers' own model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reshard.model.activation import GELU, GELU_TANH, Activation
from reshard.model.config.values import word


@dataclass(frozen=True)
class Family:
    """One model type.

    rules: those of reshard.model.config.rules that its code follows beside mlp_layer_types, the first whose keys are
    there; none where no layer has experts. defaults: of its config class, where a key is absent or null.
    one_expert_is_dense: `num_experts` of 1 makes a dense model. bias: the key that gives the matrices a bias.
    act, activation: the key of the activation ("": none is read), and the class's default; act_elsewhere: a key that
    another engine reads in its place; renamed: functions that its class takes for others. limit: the key of a limit
    that holds in dense layers (`limits`: a list of one for each layer); clamp: what it is, where that is not computed.
    fixed: what it computes, whatever the config says. ignored: keys that look as if they changed what a dense layer
    computes, and concern experts alone. names: how its dense layers are called where they are not cut. source: whose
    code was read.
    """

    rules: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    one_expert_is_dense: bool = False
    bias: str = "mlp_bias"
    act: str = "hidden_act"
    activation: str | None = "silu"
    act_elsewhere: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    limit: str | None = None
    limits: str | None = None
    clamp: str = ""
    fixed: Activation | None = None
    ignored: tuple[str, ...] = ()
    names: str = ""
    source: str = "transformers"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that decide what its dense layers compute."""
        return tuple(key for key in (self.act, self.act_elsewhere, self.limit, self.limits) if key)


def _first(count: int | None, defaults: Mapping[str, Any] | None = None, **more: Any) -> Family:
    """A family whose first layers are dense."""
    own = {} if count is None else {"first_k_dense_replace": count}
    return Family(("first_k_dense_replace",), {**own, **(defaults or {})}, **more)


def _alike(model_types: str, family: Family) -> dict[str, Family]:
    return dict.fromkeys(model_types.split(), family)


_DENSE = Family()
_GEMMA = Family(act="hidden_activation", activation="gelu_pytorch_tanh")
_ERNIE = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
_SARVAM = Family(
    ("first_k_dense_replace, moe_layer_freq from there",),
    {"first_k_dense_replace": 1, "moe_layer_freq": 1},
    source="vLLM sarvam.py",
)
_QWEN = Family(("decoder_sparse_step",), {"decoder_sparse_step": 1, "mlp_only_layers": []})

FAMILIES: dict[str, Family] = {
    # Dense in every layer.
    **_alike(
        "cohere cohere2 cwm diffllama emu3_text_model exaone4 glm glm4 glm4v_text "
        "glm_image_text glm_ocr_text granite granite_docling_text granite_swa helium "
        "higgs_audio_v2 hyperclovax internlm3 iquestcoder llama minicpm3 ministral ministral3 mistral "
        "mllama_text_model molmo2_text olmo olmo2 olmo3 olmo_hybrid paddleocr_vl_text phi3 phi4_multimodal qwen2 "
        "qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_5_text qwen3_vl_text seed_oss smollm3 stablelm "
        "voxtral_realtime_text youtu",
        _DENSE,
    ),
    **_alike("qwen2_vl qwen2_5_vl glm4v", _DENSE),  # their older configs are flat
    **_alike("hunyuan_v1_dense hunyuan_vl_text", Family(one_expert_is_dense=True)),
    "ernie4_5": Family(bias="use_bias"),
    "muse_glimmer_text": Family(act="hidden_activation"),
    "gemma": Family(
        activation="gelu_pytorch_tanh",
        act_elsewhere="hidden_activation",  # vLLM
        renamed={GELU: GELU_TANH},  # its first configs name the wrong one
    ),
    **_alike("gemma2 gemma3_text gemma4_text gemma4_unified_text vaultgemma", _GEMMA),
    "bitnet": Family(fixed=Activation("relu2 and ffn_sub_norm")),
    "gemma3n_text": Family(fixed=Activation("gelu_tanh and activation_sparsity_pattern")),
    # The first layers are dense.
    **_alike("cohere2_moe deepseek_v2 dots1 mistral4", _first(0)),
    **_alike(
        "axk1 axk2 dots3_note_text glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text hy_v3 kimi_linear laguna "
        "mimo_v2_flash mistral_large4_text unlimited_ocr_text",
        _first(1),
    ),
    **_alike("deepseek_v3 deepseek_v32 glm_moe_dsa", _first(3)),
    **_alike("glm5_next glm5_next_text", _first(3, limit="swiglu_limit", defaults={"swiglu_limit": 10.0})),
    "bailing_hybrid": _first(2, ignored=("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")),
    "beam": Family(("num_dense_layers",), {"num_dense_layers": 3}),
    "deepseek_ocr2_text": _first(None),
    "exaone_moe": _first(1, limits="swiglu_limits", clamp="clamped by vLLM and not by transformers"),
    "hy_v4": _first(1, ignored=("swiglu_limit",)),
    "afmoe": Family(("num_dense_layers",), {"num_dense_layers": 1}),
    "step3p5": Family(
        ("moe_layers_enum", "first_k_dense_replace"),
        {"first_k_dense_replace": 3},
        act="",
        limits="swiglu_limits_shared",
        clamp="clamped behind the activation",
        ignored=("swiglu_limits",),
    ),
    # Layers of both kinds in another order.
    **_alike("ernie4_5_moe ernie4_5_vl_moe_text", Family(("moe_layer_start_index",), _ERNIE, bias="use_bias")),
    **_alike("qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text", _QWEN),
    "flint": Family(("decoder_sparse_step",), {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
    "minimax_m3_vl_text": Family(
        ("first_k_dense_replace", "every layer"),
        {"dense_intermediate_size": 12288},
        fixed=Activation("swigluoai"),
    ),
    # Experts in every layer, unless mlp_layer_types says otherwise.
    **_alike(
        "aria_text deepseek_v4 flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared kolibri1 "
        "mellum minimax minimax_m2 mixtral muse_spark_text olmoe openai_privacy_filter phimoe qwen3_5_moe_text "
        "solar_open zaya",
        Family(("every layer",)),
    ),
    "hunyuan_v1_moe": Family(("moe_layer_num_skipped", "every layer"), one_expert_is_dense=True),
    # Dense layers of other names, which are not cut.
    **_alike("bamba falcon_h1 jamba lfm2_moe llama4_text", Family(names="feed_forward")),
    "longcat_flash": Family(names="mlps.0 and mlps.1"),
    # Not in transformers.
    **_alike("deepseek kimi_k2", _first(None, source="vLLM deepseek_v2.py")),
    **_alike("bailing_moe bailing_moe_v2", _first(None, source="vLLM bailing_moe.py")),
    "bailing_moe_linear": _first(0, one_expert_is_dense=True, source="vLLM bailing_moe_linear.py"),
    "ernie4_5_moe_vl": Family(("moe_layer_start_index",), bias="use_bias", source="vLLM ernie45_vl_moe.py"),
    "mimo": Family(source="vLLM mimo.py"),
    "pangu_ultra_moe": Family(("num_dense_layers", "first_k_dense_replace"), source="vLLM openpangu.py"),
    "pangu_embedded": Family(source="vLLM openpangu.py"),
    "minimax_m3_text": _first(3, fixed=Activation("swigluoai"), source="vLLM minimax_m3.py"),
    "param2moe": _first(1, source="vLLM param2moe.py"),
    **_alike("sarvam_mla sarvam_moe", _SARVAM),
    "step3_text": Family(
        ("moe_layers_enum", "first_k_dense_replace"), {"first_k_dense_replace": 1}, source="vLLM step3_text.py"
    ),
}


def family_of(language: Mapping[str, Any]) -> Family | None:
    """The family of a language model's config, None where its model_type is not known."""
    return FAMILIES.get(word(language, "model_type") or "")
