"""Names of DenseFFN tensors and of the files of a shard set: full, anchored templates only.

`model.layers.{i}.mlp.{role}.{suffix}` is a DenseFFN tensor. Routed experts (`mlp.experts.{e}.…`), shared experts
(`mlp.shared_experts.…`) and the router (`mlp.gate.…`) cannot match: their role is none of ours.
"""

import re

GATE, UP, DOWN, GATE_UP = "gate_proj", "up_proj", "down_proj", "gate_up_proj"
ROLES = (GATE, UP, DOWN)

MANIFEST = "manifest.json"
CONFIG = "config.json"

_NUMBER = r"(0|[1-9][0-9]*)"
_DENSE = re.compile(rf"model\.layers\.{_NUMBER}\.mlp\.({'|'.join(ROLES)})\.([^.]+)")
_MLP = re.compile(rf"model\.layers\.{_NUMBER}\.mlp\.(.+)")
_SHARD = re.compile(r"denseffn-rank-([0-9]{5})-of-([0-9]{5})\.safetensors")


def module_name(layer: int, role: str) -> str:
    """The linear's name, without a suffix."""
    return f"model.layers.{layer}.mlp.{role}"


def parse_dense(name: str) -> tuple[int, str, str] | None:
    """(layer, role, suffix) of a DenseFFN tensor's name, None for any other."""
    match = _DENSE.fullmatch(name)
    return (int(match[1]), match[2], match[3]) if match else None


def parse_mlp(name: str) -> tuple[int, str] | None:
    """(layer, rest) of a name below `model.layers.{i}.mlp.`, None for any other."""
    match = _MLP.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


MAX_TP_SIZE = 99_999  # what a shard file's name has digits for


def shard_file(tp_rank: int, tp_size: int) -> str:
    """A rank's file in a shard set."""
    return f"denseffn-rank-{tp_rank:05d}-of-{tp_size:05d}.safetensors"


def parse_shard_file(name: str) -> tuple[int, int] | None:
    """(tp_rank, tp_size) of a shard file's name, None for any other."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None
