"""Every model family that transformers has, against its own config class and modules: which layers are dense, how wide
they are, what they compute.

Models are made on the meta device, with the class's own defaults. A family whose code has gate_proj and that the table
does not know stands in NOT_KNOWN, with the reason.
"""

import inspect
import json
import math
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN

from reshard.model.activation import GELU, GELU_TANH, SILU, Activation
from reshard.model.config import ModelConfig, read_model_config
from reshard.model.config.act import ALIASES
from reshard.model.config.families import FAMILIES
from reshard.model.config.sizes import default_sizes
from reshard.model.naming import stands_beside

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SILU: lambda x: x * torch.sigmoid(x),
    GELU: lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    GELU_TANH: lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}
# What a class needs beside its defaults to be made at all.
_NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_hidden_layers": 12},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4},
    "hunyuan_vl_text": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "ministral": {"head_dim": 128},
}
# The model type under which a class without an automatic model is made.
_MADE_AS = {
    "deepseek_ocr2_text": "deepseek_ocr2",
    "emu3_text_model": "emu3",
    "ernie4_5_vl_moe_text": "ernie4_5_vl_moe",
    "mllama_text_model": "mllama",
    "paddleocr_vl_text": "paddleocr_vl",
    "qwen2_5_omni_text": "qwen2_5_omni_thinker",
    "qwen3_omni_moe_text": "qwen3_omni_moe_thinker",
    "step3p5": "step3p7",
    "unlimited_ocr_text": "unlimited_ocr",
    "voxtral_realtime_text": "voxtral_realtime",
}
# Keys that give a class that has none by default a dense layer.
_WITH_DENSE: dict[str, dict[str, Any]] = {
    model_type: keys
    for model_types, keys in (
        ("deepseek_v2 dots1 mistral4 cohere2_moe", {"first_k_dense_replace": 1}),
        ("qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_text qwen3_vl_moe_text", {"mlp_only_layers": [0]}),
        ("mellum muse_spark_text minimax_m3_vl_text", {"mlp_layer_types": ["dense", "sparse"]}),
    )
    for model_type in model_types.split()
}
IN_TRANSFORMERS = sorted(name for name, family in FAMILIES.items() if family.source == "transformers")


@lru_cache(maxsize=1)
def made(model_type: str, keys: str = "{}") -> tuple[Any, dict[int, Any]]:
    """(the language model's config, its dense MLPs by layer)."""
    more = {**_NEEDED.get(model_type, {}), **json.loads(keys)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model_type in _MADE_AS:
            config = CONFIG_MAPPING[_MADE_AS[model_type]](text_config={"model_type": model_type, **more})
        else:
            config = CONFIG_MAPPING[model_type](**more)
        language = config.get_text_config(decoder=True)
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(config)
            except ValueError:
                model = AutoModel.from_config(config)
    mlps = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"((?:\w+\.)*?)layers\.(\d+)\.mlp", name)
        children = {child for child, _ in module.named_children()}
        if (
            match
            and not stands_beside(match[1])
            and "down_proj" in children
            and children & {"gate_proj", "gate_up_proj"}
        ):
            mlps[int(match[2])] = module
    return language, mlps


def accounts(language: Any) -> dict[str, ModelConfig]:
    """What is read of the ways in which a config can be written."""
    whole = json.loads(json.dumps(language.to_dict(), default=str))
    brief = json.loads(json.dumps(language.to_diff_dict(), default=str))
    sizes = {
        "num_hidden_layers",
        "num_layers",
        "hidden_size",
        "model_type",
        *(key for key in whole if "intermediate_size" in key),
    }
    least = {key: whole[key] for key in sizes if key in whole}
    return {name: read_model_config(said) for name, said in (("whole", whole), ("brief", brief), ("least", least))}


@pytest.mark.parametrize("model_type", IN_TRANSFORMERS)
def test_dense_layers(model_type: str) -> None:
    """Of the class's defaults; also where the keys that decide are absent."""
    language, mlps = made(model_type)
    for way, model in accounts(language).items():
        if way == "least" and _NEEDED.get(model_type, {}).keys() & {"mlp_layer_types"}:
            continue
        assert model.dense_layers == mlps.keys(), (way, model.reason)
        assert not model.other_accounts
        assert not model.doubts


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        *((name, {"first_k_dense_replace": 2}) for name in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe")),
        *((name, {"first_k_dense_replace": 2}) for name in ("glm_moe_dsa", "exaone_moe", "cohere2_moe", "kimi_linear")),
        ("glm4v_moe_text", {"first_k_dense_replace": 0}),
        ("axk1", {"first_k_dense_replace": 1, "moe_layer_freq": 2}),
        ("dots3_note_text", {"first_k_dense_replace": 1, "moe_layer_freq": [0, 1, 0, 1, 1, 0]}),
        ("minimax_m3_vl_text", {"moe_layer_freq": [0, 1, 0, 1, 1, 0]}),
        *(
            (name, {"mlp_layer_types": ["dense", "sparse"] * 3})
            for name in ("hy_v3", "glm4_moe_lite", "laguna", "beam")
        ),
        *(
            (name, {"mlp_layer_types": ["sparse", "dense"] * 3})
            for name in ("mimo_v2_flash", "glm5_next_text", "mellum")
        ),
        ("muse_spark_text", {"mlp_layer_types": ["sparse", "dense"] * 3}),
        ("step3p5", {"moe_layers_enum": "1,2,4,5"}),
        ("afmoe", {"num_dense_layers": 3}),
        ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 4, "moe_layer_interval": 1}),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 2}),
        *((name, {"decoder_sparse_step": 2}) for name in ("qwen2_moe", "qwen3_moe", "qwen3_next")),
        ("qwen3_moe", {"mlp_only_layers": [0, 4]}),
        ("flint", {"mlp_only_layers": [2]}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_keys(model_type: str, keys: dict[str, Any]) -> None:
    """The same, where the keys say something else than the defaults."""
    layers = {"num_hidden_layers": 6}
    language, mlps = made(model_type, json.dumps(keys | layers))
    said = json.loads(json.dumps(language.to_dict(), default=str))
    raw = {key: value for key, value in said.items() if key != "mlp_layer_types"} | keys
    for config in (said, raw):
        model = read_model_config(config)
        assert model.dense_layers == mlps.keys(), model.reason
        assert not model.other_accounts
    assert 0 < len(mlps) < 6 or keys == {"first_k_dense_replace": 0}


def _small(mlp: Any) -> Any:
    """The module with small matrices."""
    torch.manual_seed(0)
    for name, child in list(mlp.named_children()):
        if isinstance(child, torch.nn.Linear):
            shape = {"down_proj": (16, 8), "gate_up_proj": (8, 32)}.get(name, (8, 16))
            setattr(mlp, name, torch.nn.Linear(*shape, bias=False))
    return mlp


def _formula(mlp: Any, activation: Activation, x_TH: torch.Tensor) -> torch.Tensor:
    """What reshard.model.activation says, in torch."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.gate_up_proj(x_TH).chunk(2, dim=-1)
    else:
        gate, up = mlp.gate_proj(x_TH), mlp.up_proj(x_TH)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    result: torch.Tensor = mlp.down_proj(_FUNCTIONS[activation.name](gate) * up)
    return result


_WITHOUT_DENSE = {name for name, family in FAMILIES.items() if family.names or "every layer" in family.rules}
_OWN_PARTS = {"bitnet"}  # its MLP has a norm, whose name the cut refuses


WITH_DENSE = sorted({*IN_TRANSFORMERS} - _WITHOUT_DENSE - _OWN_PARTS | _WITH_DENSE.keys())


_NEVER_FEWER_LAYERS = {"deepseek_ocr2_text", "gemma3n_text"}


def _a_dense_layer(model_type: str, more: dict[str, Any]) -> tuple[Any, int, Any]:
    """(the config, a dense layer, its MLP)."""
    keys: dict[str, Any] = {} if model_type in _NEVER_FEWER_LAYERS else {"num_hidden_layers": 4}
    keys |= _WITH_DENSE.get(model_type, {}) | more
    keys |= {"num_hidden_layers": 2} if "mlp_layer_types" in keys else {}
    language, mlps = made(model_type, json.dumps(keys))
    return language, *next(iter(mlps.items()))


def _compare(mlp: Any, activation: Activation) -> None:
    """The module's own output with the formula's, in float64, on small tokens and on large ones.

    Small ones tell the two gelus from each other, large ones reach a limit.
    """
    noise_TH = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_TH = torch.cat([3 * noise_TH, 30 * noise_TH], dim=1)
    small = _small(deepcopy(mlp)).double().eval()
    with torch.no_grad():
        right = small(x_TH)
        for name in [activation.name] if activation.is_known else _FUNCTIONS:
            found = _formula(small, Activation(name, activation.limit if activation.is_known else None), x_TH)
            error = ((found - right).norm(dim=-1) / right.norm(dim=-1)).max().item()
            assert (error < 1e-6) == activation.is_known, (name, error)


@pytest.mark.parametrize("model_type", WITH_DENSE)
def test_what_a_dense_layer_computes(model_type: str) -> None:
    """Its activation and limit, by the module's own forward; its width, by the module's own weights."""
    language, layer, mlp = _a_dense_layer(model_type, {})
    for model in accounts(language).values():
        assert mlp.down_proj.weight.shape == (model.hidden_size, model.intermediate_size)
    for activation in {model.activation(layer) for model in accounts(language).values()}:
        assert activation is not None
        _compare(mlp, activation)


_NO_LONGER_FLAT = {"glm4v", "glm4v_moe"}  # their classes ignore what older configs have at the top


@pytest.mark.parametrize("model_type", [name for name in WITH_DENSE if name not in _NO_LONGER_FLAT])
def test_what_config_json_says_is_what_the_class_makes_of_it(model_type: str) -> None:
    """The file's own keys, before the class has changed them: it may rename a function, or read another key."""
    for keys in ({"hidden_act": "gelu"}, {"hidden_act": "silu"}, {"hidden_activation": "gelu"}):
        language, layer, mlp = _a_dense_layer(model_type, keys)
        whole = json.loads(json.dumps(language.to_dict(), default=str))
        rest = {key: value for key, value in whole.items() if key not in {"hidden_act", "hidden_activation"}}
        activation = read_model_config(rest | keys).activation(layer)
        assert activation is not None
        if activation.is_known:
            _compare(mlp, activation)
        else:  # what no class computes, or what another engine reads otherwise
            assert FAMILIES[model_type].fixed == activation or FAMILIES[model_type].act_elsewhere in activation.name


def test_sizes_that_a_nested_config_leaves_out() -> None:
    """Those of the class."""
    for model_type, sizes in default_sizes().items():
        whole = json.loads(json.dumps(CONFIG_MAPPING[model_type]().to_dict(), default=str))
        (model, brief) = (read_model_config({"text_config": said}) for said in (whole, {"model_type": model_type}))
        for key in sizes:
            assert getattr(brief, key) == getattr(model, key), (model_type, key)
        assert any(f"{key} {value}" in doubt for doubt in brief.doubts for key, value in sizes.items())
    wrappers = {"qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm5_next"}
    assert default_sizes().keys() == {*WITH_DENSE} - wrappers | _OWN_PARTS


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_aliases(name: str) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(ACT2FN[name](x), _FUNCTIONS[ALIASES[name]](x), rtol=1e-9, atol=1e-9)


def test_no_other_name_is_one_of_them() -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    for name in set(ACT2FN) - set(ALIASES) - {"xielu", "prelu", "gelu_10"}:
        of_transformers: Any = ACT2FN[name]
        for known, function in _FUNCTIONS.items():
            assert not torch.allclose(of_transformers(x), function(x), rtol=1e-6, atol=1e-6), (name, known)


NOT_KNOWN = {
    "a tower, a draft, a codec or another part of a model": """
        aimv2_text_model aimv2_vision_model blt_global_transformer blt_local_decoder blt_local_encoder
        blt_patcher csm csm_depth_decoder_model deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model dia_encoder
        dinov2 dinov2_with_registers dinov3_vit dots3_note_audio_encoder dots3_note_vision_encoder eomt
        eomt_dinov3 gemma4_audio gemma4_vision granite_docling_vision hunyuan_vl_vision idefics2_vision
        idefics_vision inkling2_vision llama4_vision_model minimax_m3_vl_vision mllama_vision_model
        molmo2_vision moonshine_streaming_encoder muse_glimmer_assistant muse_glimmer_vision muse_spark_audio
        muse_spark_vision ovis2_vision paddleocr_vl_vision pe_audio_encoder pe_audio_video_encoder
        pe_video_encoder phi4_multimodal_vision pixtral qwen2_5_omni_dit qwen2_5_omni_talker
        qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text radio rf_detr_dinov2 sapiens2
        step3p5_vision timesfm tipsv2_text_model tipsv2_vision_model unlimited_ocr_sam_vision_model
        unlimited_ocr_vision_encoder vibevoice_diffusion videomt voxtral_realtime_encoder""",
    "an encoder, or an encoder's decoder": """
        embedding_gemma2_text esmc eurobert gte neomme nomic_bert t5_gemma_module t5gemma2_decoder t5gemma2_text
        ultrabert""",
    "layers of other names, or two stacks of them": "hrm_text idefics recurrent_gemma zamba zamba2",
    "its MLP has a factor or a part of its own": "doge inkling2_text inkling_text",
    "its class cannot be made from its defaults, so that nothing here would be compared": """
        EvollaModel chameleon cohere_compass_text diffusion_gemma_text evolla granite4_vision_text qwen4_exp_text""",
}


def test_every_family_of_transformers_is_listed() -> None:
    """Whoever takes a newer transformers decides on its new families."""
    found = set()
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # a class that needs more than its defaults, for reasons of its own
            continue
        module = Path(inspect.getfile(type(config)))
        code = "".join(path.read_text() for path in module.parent.glob("modeling_*.py"))
        layers = config.to_dict().get("num_hidden_layers")
        if (
            config.get_text_config(decoder=True) is config
            and type(layers) is int
            and re.search(r"gate_(up_)?proj", code)
        ):
            found.add(model_type)
    not_known = {model_type for listed in NOT_KNOWN.values() for model_type in listed.split()}
    assert found - FAMILIES.keys() == not_known


@pytest.mark.parametrize("model_type", ["llama", "seed_oss", "granite", "ernie4_5", "ernie4_5_moe", "deepseek_v2"])
def test_biases(model_type: str) -> None:
    key = FAMILIES[model_type].bias
    for value in (True, False):
        language, mlps = made(model_type, json.dumps({key: value} | _WITH_DENSE.get(model_type, {})))
        (model, *_) = accounts(language).values()
        assert (model.bias == key) == (next(iter(mlps.values())).down_proj.bias is not None) == value
