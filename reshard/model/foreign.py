"""Names of feed-forward layers that are not cut: what they are, and what would be.

Each with a file that has such names.
"""

import re
from collections.abc import Iterable

from reshard.model.naming import stands_beside

_KNOWN = (
    (
        r"\.lora_[AB]\.(?:speech|vision)\.",
        "Phi-4-multimodal's adapters, one for each kind of input, so that merging them would change the model; give "
        "its files in transformers' format (model_type phi4_multimodal)",
    ),
    (
        r"\.base_layer\.|\.lora_[AB]\.",
        "a LoRA adapter that is not merged (PEFT); merge it (merge_and_unload) and save the model",
    ),
    (
        r"^layers\.\d+\.feed_forward\.w[123]\.",
        "Mistral's and Meta's own names (params.json, consolidated.safetensors); give the model's Hugging Face files",
    ),
    (
        r"\.layers\.\d+\.feed_forward\.w[123]\.",
        "an MLP named feed_forward.w1 to w3 (InternLM2, LFM2), which this version does not cut",
    ),
    (
        r"(?:^|\.)layers\.\d+\.feed_forward\.(?:gate|up|down)_proj\.",
        "an MLP named feed_forward (Llama 4, Falcon-H1, Jamba), which this version does not cut",
    ),
    (
        r"(?:^|\.)layers\.\d+\.mlps\.\d+\.",
        "LongCat's two MLPs a layer; they are not cut by this version",
    ),
    (
        r"(?:^|\.)layers\.\d+\.mlp\.(?:language|vision)_mlp\.",
        "CogVLM's two MLPs a layer, one for text and one for images; they are not cut by this version",
    ),
    (
        r"(?:^|\.)layers\.\d+\.ffn\.experts\.|(?:^|\.)layers\.\d+\.ffn\.gate\.",
        "DeepSeek's own names, and expert layers all of them",
    ),
    (
        r"(?:^|\.)layers\.\d+\.ffn\.w[123]\.",
        "DeepSeek's own names (its inference/convert.py); give the model's Hugging Face files",
    ),
    (
        r"(?:^|\.)layers\.\d+\.mlp\.linear_fc[12]\.",
        "Megatron-Core's names; convert the checkpoint to Hugging Face format, and cut that",
    ),
    (
        r"\.up_gate_proj\.",
        "PaddlePaddle's names, its weights are stored as [in, out]; give the model's -PT repository",
    ),
    (
        r"\.gate_and_up_proj\.",
        "gate and up stacked with up first (Hunyuan-Large), which this version does not cut",
    ),
    (
        r"\.mlp\.act_fn\.",
        "an activation with weights of its own (xIELU, Apertus), which this version neither cuts nor computes",
    ),
    (
        r"(?:^|\.)h\.\d+\.mlp\.(?:gate|up|down)_proj\.",
        "layers named h instead of layers (TeleChat), which this version does not cut",
    ),
    (
        r"(?:^|\.)layers\.\d+\.mixer\.(?:up|down)_proj\.",
        "an MLP without a gate, named mixer (Nemotron-H), which this version does not cut",
    ),
    (
        r"^(?!.*\.experts\.).*\.(?:c_fc(?:_\d)?|fc1|dense_h_to_4h|w1|ff_proj)\.",
        "an MLP without gate_proj, up_proj and down_proj, which this version does not cut",
    ),
    (
        r"\.(?:input|weight|output)_quantizer\.",
        "ModelOpt's simulated quantization, QAT or PTQ: weights that are not exported yet; export them with its "
        "export_hf_checkpoint, and cut what that writes",
    ),
    (
        r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state)",
        "bitsandbytes' 4 bits, which this version does not split; cut the BF16 original",
    ),
    (r"\.weight\._(?:data|scale|shift)$", "quanto, which this version does not split; cut the BF16 original"),
    (r"\.experts\.", "expert layers"),
)
_NEAR = re.compile(r"mlp|ffn|feed_?forward|mixer", re.IGNORECASE)


def what_is(name: str) -> str | None:
    """What a tensor of such a name is, and what would be cut; None for a name that is not known."""
    return next((what for pattern, what in _KNOWN if re.search(pattern, name)), None)


def what_is_there(names: Iterable[str]) -> str:
    """To be added to a line that says that there is no dense layer: the nearest name, and what it is.

    Names of towers and drafts count only where there are no others.
    """
    names = sorted(names)
    names = [name for name in names if not stands_beside(_above(name))] or names
    known = {name: what for name in names if (what := what_is(name)) is not None}
    for _, what in _KNOWN:  # in the table's order: what says more comes first
        example = next((name for name, found in known.items() if found == what), None)
        if example is not None:
            return f"; the nearest is {example}: {what}"
    near = next((name for name in names if _NEAR.search(name)), None)
    return f"; the nearest is {near}" if near else ""


def _above(name: str) -> str:
    """What precedes a name's first number."""
    return re.split(r"\.\d", name, maxsplit=1)[0] + "."
