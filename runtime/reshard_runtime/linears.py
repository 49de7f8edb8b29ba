"""From the tensors of a shard's file to a layer's linears: stacked, whatever the file's layout."""

from collections.abc import Mapping

import torch

from reshard.errors import ShardError
from reshard.manifest import LayerEntry, LinearScheme, Manifest
from reshard.model.naming import linear_name
from reshard.model.parts import Module
from reshard.schemes.table import Arithmetic, Placement, scheme_named, variant_with
from reshard_runtime.shard import LinearShard


def linears_of(
    manifest: Manifest, layer: LayerEntry, tensors: Mapping[str, torch.Tensor], file: str
) -> tuple[LinearShard, ...]:
    """A layer's linears as the fused layout has them, stacked where the file keeps them apart."""
    return tuple(_linear(manifest, module, layer, tensors, file) for module in manifest.what.modules)


def _linear(
    manifest: Manifest, module: Module, layer: LayerEntry, tensors: Mapping[str, torch.Tensor], file: str
) -> LinearShard:
    def named(linear: str) -> str:
        return linear_name(manifest.model.prefix, layer.index, linear, manifest.what)

    name, said = named(module.name), layer.linears[module.name]
    held = _of(name, tensors)
    if not held:
        apart = {role.name: _of(named(role.name), tensors) for role in module.roles}
        held = _stacked(name, said, apart, file)
    return LinearShard(name, said.scheme, said.block, held)


def _of(module: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    start = f"{module}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _stacked(
    name: str, said: LinearScheme, apart: Mapping[str, Mapping[str, torch.Tensor]], file: str
) -> dict[str, torch.Tensor]:
    """One above the other. What is of the tokens they must agree in: one quantization of the tokens serves all.

    Where only weights are multiplied, values of a whole linear that differ stand one after the other.
    """
    (first, upper), *others = apart.items()
    rows, _ = said.block or (1, 1)
    if len(upper["weight"]) % rows:
        raise ShardError(
            f"{file}: {name}: {len(upper['weight'])} rows of {first} are no multiple of the {rows}-row scale block, so "
            "nothing can be stacked below them; cut the set again with --layout fused"
        )
    for role, lower in others:
        if upper.keys() != lower.keys():
            raise ShardError(
                f"{file}: {name}: {first} has {', '.join(sorted(upper))}, {role} has {', '.join(sorted(lower))}"
            )
    stacked = {}
    scaled = scheme_named(said.scheme, name).arithmetics == (Arithmetic.SCALED,)
    for rule in variant_with(said.scheme, upper.keys(), name).tensors:
        parts = [tensors[rule.suffix] for tensors in apart.values()]
        if rule.column is Placement.ROWS:
            stacked[rule.suffix] = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        elif all(torch.equal(parts[0], part) for part in parts[1:]):
            stacked[rule.suffix] = parts[0]
        elif scaled:
            stacked[rule.suffix] = torch.cat([part.reshape(1) for part in parts])
        else:
            values = zip(apart, (part.flatten().tolist()[:4] for part in parts), strict=True)
            raise ShardError(
                f"{file}: {name}.{rule.suffix}: {', '.join(f'{role} has {value}' for role, value in values)}; tokens "
                "are quantized once for all, so they must be the same"
            )
    return stacked
