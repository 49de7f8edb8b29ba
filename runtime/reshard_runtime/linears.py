"""From the tensors of a shard's file to a layer's linears: gate and up stacked, whatever the file's layout."""

from collections.abc import Mapping

import torch

from reshard.errors import ShardError
from reshard.manifest import LayerEntry
from reshard.model.naming import DOWN, GATE, GATE_UP, UP
from reshard_runtime.shard import LinearShard

_CUT_BY_ROWS = frozenset({"weight", "weight_scale", "weight_scale_inv", "weight_offset", "quant_bias", "deq_scale"})


def linears_of(
    mlp: str, layer: LayerEntry, tensors: Mapping[str, torch.Tensor], file: str
) -> tuple[LinearShard, LinearShard]:
    """gate_up and down of a layer; gate and up are stacked where the file keeps them apart."""

    def of(module: str) -> dict[str, torch.Tensor]:
        start = f"{mlp}.{module}."
        return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

    name = f"{mlp}.{GATE_UP}"
    gate_up = of(GATE_UP)
    if not gate_up:
        gate, up = (of(module) for module in (GATE, UP))
        rows, _ = layer.linears[GATE_UP].block or (1, 1)
        if len(gate["weight"]) % rows:
            raise ShardError(
                f"{file}: {name}: {len(gate['weight'])} rows of gate are no multiple of the {rows}-row scale block, so "
                "up cannot be stacked below them; cut the set again with --layout fused"
            )
        gate_up = _stacked(name, gate, up, file)
    return (
        LinearShard(name, layer.linears[GATE_UP].scheme, layer.linears[GATE_UP].block, gate_up),
        LinearShard(f"{mlp}.{DOWN}", layer.linears[DOWN].scheme, layer.linears[DOWN].block, of(DOWN)),
    )


def _stacked(
    name: str, gate: Mapping[str, torch.Tensor], up: Mapping[str, torch.Tensor], file: str
) -> dict[str, torch.Tensor]:
    """Gate above up. What the two share they must agree in: one quantization of the tokens serves both."""
    if gate.keys() != up.keys():
        raise ShardError(f"{file}: {name}: gate has {', '.join(sorted(gate))}, up has {', '.join(sorted(up))}")
    stacked = {}
    for suffix, one in gate.items():
        other = up[suffix]
        if suffix in _CUT_BY_ROWS:
            stacked[suffix] = torch.cat([one.view(torch.uint8), other.view(torch.uint8)]).view(one.dtype)
        elif torch.equal(one, other):
            stacked[suffix] = one
        else:
            raise ShardError(
                f"{file}: {name}.{suffix}: gate's is {one.flatten().tolist()[:4]}, up's {other.flatten().tolist()[:4]}"
                "; tokens are quantized once for both, so they must be the same"
            )
    return stacked
