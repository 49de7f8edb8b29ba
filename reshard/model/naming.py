"""Names of DenseFFN tensors and of the files of a shard set: full, anchored templates only.

`{prefix}layers.{i}.mlp.{role}.{suffix}` is a DenseFFN tensor. The prefix is `model.`, that of a wrapper
(`language_model.model.`), or nothing. Routed experts (`mlp.experts.{e}.…`), shared experts (`mlp.shared_experts.…`) and
the router (`mlp.gate.…`) cannot match: their role is none of ours. Nor can towers and MTP layers that stand beside a
language model: their prefix says what they are.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from reshard.model.parts import DENSE_FFN, Part

ROLES = tuple(role.name for role in DENSE_FFN.roles)

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
_DENSE = re.compile(
    rf"{_PREFIX}layers\.{_NUMBER}\.{re.escape(DENSE_FFN.path)}\.({'|'.join(DENSE_FFN.names())})\.([^.]+)"
)
_LAYER = re.compile(rf"{_PREFIX}layers\.{_NUMBER}\.(.+)")
_SHARD = re.compile(r"denseffn-rank-([0-9]{5})-of-([0-9]{5})\.safetensors")
_BESIDE = re.compile(
    r"(?:^|[._])(?:vision|visual|vit|image|video|audio|speech|talker|tts|code2wav|token2wav|code_predictor|"
    r"depth_decoder|encoder|perceiver|resampler|projector|adapter|connector|q_?former|mtp|nextn|draft|assistant|"
    r"speculator|eagle)(?:[._]|[0-9])"
)

_WITHIN = re.compile(r"(?:^|[._])(?:vision|visual|eagle)_(?:model\.)?language_model\.")
"""A language model whose name, or that of what holds it, has a tower's word in it."""


class DenseName(NamedTuple):
    """The parts of a DenseFFN tensor's name. `role` is a stacked module where a checkpoint stacks its linears."""

    prefix: str
    layer: int
    role: str
    suffix: str


def layer_name(prefix: str, layer: int) -> str:
    """A decoder layer's name."""
    return f"{prefix}layers.{layer}"


def module_name(prefix: str, layer: int, part: Part = DENSE_FFN) -> str:
    """The name of what holds a part's linears; theirs are `{module_name}.{role}`."""
    return f"{layer_name(prefix, layer)}.{part.path}"


def parse_dense(name: str) -> DenseName | None:
    """The parts of a DenseFFN tensor's name, None for any other."""
    match = _DENSE.fullmatch(name)
    if match is None or stands_beside(match[1]):
        return None
    return DenseName(match[1], int(match[2]), match[3], match[4])


def parse_layer(name: str) -> tuple[str, int, str] | None:
    """(prefix, layer, rest) of a name below `{prefix}layers.{i}.`, None for any other."""
    match = _LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def stands_beside(prefix: str) -> bool:
    """Whether a prefix is that of a tower, a draft or an MTP layer, and not the language model's."""
    return _BESIDE.search(prefix) is not None and _WITHIN.search(prefix) is None


MAX_TP_SIZE = 99_999  # what a shard file's name has digits for


def shard_file(tp_rank: int, tp_size: int) -> str:
    """A rank's file in a shard set."""
    return f"denseffn-rank-{tp_rank:05d}-of-{tp_size:05d}.safetensors"


def shard_metadata(tp_rank: int, tp_size: int) -> dict[str, str]:
    """What the header of a rank's file says beside its tensors."""
    return {"format": "pt", "denseffn": "shard", "tp_rank": str(tp_rank), "tp_size": str(tp_size)}


def parse_shard_file(name: str) -> tuple[int, int] | None:
    """(tp_rank, tp_size) of a shard file's name, None for any other."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def numbers(values: Iterable[int]) -> str:
    """Layer numbers, runs shortened: 0-2, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def layers_named(values: Collection[int]) -> str:
    """The same with its noun: layer 7, layers 0-2."""
    return f"layer{'s' if len(values) != 1 else ''} {numbers(values)}"
