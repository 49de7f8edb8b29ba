"""From the tensors of a shard's file to a layer's linears: gate and up stacked, whatever the file's layout."""

from collections.abc import Mapping

import torch

from reshard.errors import ShardError
from reshard.manifest import LayerEntry
from reshard.model.naming import DOWN, GATE, GATE_UP, UP
from reshard.schemes import Arithmetic, Placement, scheme_named, variant_with
from reshard_runtime.shard import LinearShard


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
        gate_up = _stacked(name, layer.linears[GATE_UP].scheme, gate, up, file)
    return (
        LinearShard(name, layer.linears[GATE_UP].scheme, layer.linears[GATE_UP].block, gate_up),
        LinearShard(f"{mlp}.{DOWN}", layer.linears[DOWN].scheme, layer.linears[DOWN].block, of(DOWN)),
    )


def _stacked(
    name: str, scheme: str, gate: Mapping[str, torch.Tensor], up: Mapping[str, torch.Tensor], file: str
) -> dict[str, torch.Tensor]:
    """Gate above up. What is of the tokens the two must agree in where one quantization of the tokens serves both.

    Where only weights are multiplied, values of a whole linear that differ stand one after the other.
    """
    if gate.keys() != up.keys():
        raise ShardError(f"{file}: {name}: gate has {', '.join(sorted(gate))}, up has {', '.join(sorted(up))}")
    stacked = {}
    apart = scheme_named(scheme, name).arithmetics == (Arithmetic.SCALED,)
    for rule in variant_with(scheme, gate.keys(), name).tensors:
        suffix, one, other = rule.suffix, gate[rule.suffix], up[rule.suffix]
        if rule.column is Placement.ROWS:
            stacked[suffix] = torch.cat([one.view(torch.uint8), other.view(torch.uint8)]).view(one.dtype)
        elif torch.equal(one, other):
            stacked[suffix] = one
        elif apart:
            stacked[suffix] = torch.cat([one.reshape(1), other.reshape(1)])
        else:
            raise ShardError(
                f"{file}: {name}.{suffix}: gate's is {one.flatten().tolist()[:4]}, up's {other.flatten().tolist()[:4]}"
                "; tokens are quantized once for both, so they must be the same"
            )
    return stacked
