"""Names of the parts' tensors and of the files of a shard set: full, anchored templates only.

`{prefix}layers.{i}.mlp.{role}.{suffix}` is a DenseFFN tensor, `{prefix}layers.{i}.self_attn.o_proj.{suffix}` one of
o_proj, `{prefix}embed_tokens.{suffix}` the embedding's, `{prefix}lm_head.{suffix}` the LM head's. The prefix is
`model.`, that of a wrapper (`language_model.model.`), or nothing. Routed experts (`mlp.experts.{e}.…`), shared experts
(`mlp.shared_experts.…`) and the router (`mlp.gate.…`) cannot match: their role is none of ours. Nor can towers and MTP
layers that stand beside a language model: their prefix says what they are.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from reshard.model.parts import DENSE_FFN, PARTS, Part, Place

MANIFEST = "manifest.json"
CONFIG = "config.json"

PREFIX = "model."
"""The prefix of a checkpoint that is a language model and nothing else."""

WRAPPED = (
    "language_model.model.",  # Kimi K2.5, Mistral 3, LLaVA, InternVL, Llama 4
    "model.language_model.",  # GLM-4.5V, Qwen3.5, Qwen3-VL, InternS1, whatever transformers 5 saves
    "language_model.",  # MOSS
    "language.model.",  # DeepSeek-VL2
    "thinker.model.",  # Qwen2.5-Omni, Qwen3-Omni
    "llm.model.",  # MiniCPM-V, Ovis
    "model.text_model.",  # Idefics 3, SmolVLM
)
"""The prefixes of language models in wrappers, as published checkpoints have them."""

_NUMBER = r"(0|[1-9][0-9]*)"
_PREFIX = r"((?:[^.]+\.)*?)"
_TENSOR = {
    key: re.compile(
        _PREFIX
        + (rf"layers\.{_NUMBER}\.{re.escape(part.path)}\." if part.place.in_layers else "()")
        + rf"({'|'.join(part.names())})\.([^.]+)"
    )
    for key, part in PARTS.items()
}
_LAYER = re.compile(rf"{_PREFIX}layers\.{_NUMBER}\.(.+)")
_SHARD = re.compile(rf"({'|'.join(PARTS)})-rank-([0-9]{{5}})-of-([0-9]{{5}})\.safetensors")
_BESIDE = re.compile(
    r"(?:^|[._])(?:vision|visual|vit|image|video|audio|speech|talker|tts|code2wav|token2wav|code_predictor|"
    r"depth_decoder|encoder|perceiver|resampler|projector|adapter|connector|q_?former|mtp|nextn|draft|assistant|"
    r"speculator|eagle)(?:[._]|[0-9])"
)

_WITHIN = re.compile(r"(?:^|[._])(?:vision|visual|eagle)_(?:model\.)?language_model\.")
"""A language model whose name, or that of what holds it, has a tower's word in it."""


class PartName(NamedTuple):
    """What the name of a part's tensor says. `role` is a stacked module where a checkpoint stacks its linears.

    layer: None of a part that a model has once.
    """

    prefix: str
    layer: int | None
    role: str
    suffix: str


def layer_name(prefix: str, layer: int) -> str:
    """A decoder layer's name."""
    return f"{prefix}layers.{layer}"


def module_name(prefix: str, layer: int | None, part: Part = DENSE_FFN) -> str:
    """The name of what holds a layer's linears of a part; of a part that the model has once, the linear's own."""
    return f"{prefix}{part.modules[0].name}" if layer is None else f"{layer_name(prefix, layer)}.{part.path}"


def linear_name(prefix: str, layer: int | None, name: str, part: Part = DENSE_FFN) -> str:
    """The name of a part's linear, or of what stacks some."""
    return f"{prefix}{name}" if layer is None else f"{module_name(prefix, layer, part)}.{name}"


def parse_tensor(name: str, part: Part = DENSE_FFN) -> PartName | None:
    """What the name of a part's tensor says, None for any other."""
    match = _TENSOR[part.key].fullmatch(name)
    if match is None or stands_beside(match[1]):
        return None
    if part.place.in_layers:
        return PartName(match[1], int(match[2]), match[3], match[4])
    return PartName(match[1], None, match[3], match[4]) if parse_layer(name) is None else None


def parse_layer(name: str) -> tuple[str, int, str] | None:
    """(prefix, layer, rest) of a name below `{prefix}layers.{i}.`, None for any other."""
    match = _LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def stands_beside(prefix: str) -> bool:
    """Whether a prefix is that of a tower, a draft or an MTP layer, and not the language model's."""
    return _BESIDE.search(prefix) is not None and _WITHIN.search(prefix) is None


MAX_TP_SIZE = 99_999  # what a shard file's name has digits for


class ShardName(NamedTuple):
    """What the name of a shard's file says."""

    part: str
    tp_rank: int
    tp_size: int

    @property
    def file(self) -> str:
        """The name."""
        return f"{self.part}-rank-{self.tp_rank:05d}-of-{self.tp_size:05d}.safetensors"

    @property
    def metadata(self) -> dict[str, str]:
        """What the file's header says beside its tensors."""
        return {"format": "pt", self.part: "shard", "tp_rank": str(self.tp_rank), "tp_size": str(self.tp_size)}


def shard_file(tp_rank: int, tp_size: int, part: str = DENSE_FFN.key) -> str:
    """A rank's file in a shard set."""
    return ShardName(part, tp_rank, tp_size).file


def parse_shard_file(name: str) -> ShardName | None:
    """What a shard file's name says, None for any other."""
    match = _SHARD.fullmatch(name)
    return ShardName(match[1], int(match[2]), int(match[3])) if match else None


def numbers(values: Iterable[int]) -> str:
    """Layer numbers, runs shortened: 0-2, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def counted_layers(part: Part, count: int) -> str:
    """What has a part, in words: 3 dense layers, 61 layers, the LM head."""
    if not part.place.in_layers:
        return f"the {part.name}"
    what = "dense layer" if part.place is Place.DENSE_LAYERS else "layer"
    return f"{count} {what}{'' if count == 1 else 's'}"


def of_part(part: Part) -> str:
    """Whose a tensor of a part is: of a dense layer, of o_proj, of the LM head."""
    if part.place is Place.DENSE_LAYERS:
        return "of a dense layer"
    return f"of {'' if part.place.in_layers else 'the '}{part.name}"


def layers_named(values: Collection[int]) -> str:
    """The same with its noun: layer 7, layers 0-2."""
    return f"layer{'s' if len(values) != 1 else ''} {numbers(values)}"
