"""Weights that a device has no kernel for, as BF16.

value = stored * scale of its channel or block, in float32, rounded once to BF16 (DeepSeek-V3 `inference/kernel.py`,
weight_dequant; compressed-tensors `dequantize`). Shapes: [N, K] a weight, b x k its scale block.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from reshard.errors import ShardError
from reshard_runtime.kernels import Kernels
from reshard_runtime.shard import LayerShard, LinearShard

_log = logging.getLogger(__name__)
_CHUNK_ELEMENTS = 1 << 22
_BY_BLOCK = {"fp8_block", "int8_block"}
_SCALES = ("weight_scale_inv", "weight_scale")
_GIB = 1 << 30


def dequantized(layers: Mapping[int, LayerShard], kernels: Kernels) -> dict[int, LayerShard]:
    """The layers with every linear in a scheme that `kernels` has; one line of the log for all that were changed."""
    found = {
        index: replace(layer, gate_up=_linear(layer.gate_up, kernels), down=_linear(layer.down, kernels))
        for index, layer in layers.items()
    }
    changed = [
        (before, after)
        for index in found
        for before, after in (
            (layers[index].gate_up, found[index].gate_up),
            (layers[index].down, found[index].down),
        )
        if before is not after
    ]
    if changed:
        stored, held = (sum(linear.nbytes for linear in side) for side in zip(*changed, strict=True))
        _log.warning(
            "%s has no kernel for %s: %d linears are held as BF16, %.3f GiB instead of %.3f",
            kernels.name,
            ", ".join(sorted({before.scheme for before, _ in changed})),
            len(changed),
            held / _GIB,
            stored / _GIB,
        )
    return found


def _linear(linear: LinearShard, kernels: Kernels) -> LinearShard:
    if kernels.has(linear.scheme):
        return linear
    scales = [linear.tensors[suffix] for suffix in _SCALES if suffix in linear.tensors]
    if linear.tensors.keys() - {"weight", *_SCALES} or len(scales) != 1 or "weight" not in linear.tensors:
        raise ShardError(
            f"{linear.name}: {linear.scheme} with {', '.join(sorted(linear.tensors))}; wanted are weight and one scale"
        )
    weight, scale = linear.tensors["weight"], scales[0]
    if linear.scheme in _BY_BLOCK:
        if linear.block is None:
            raise ShardError(
                f"{linear.name}: {linear.scheme}, and manifest.json gives no block size; cut the set again"
            )
        block = linear.block
    else:
        block = (1, weight.shape[1])
    grid = [-(-size // extent) for size, extent in zip(weight.shape, block, strict=True)]
    if scale.numel() != grid[0] * grid[1]:
        raise ShardError(
            f"{linear.name}: a scale of {list(scale.shape)} for a weight of {list(weight.shape)} in blocks of "
            f"{list(block)}, wanted is {grid}; cut the set again"
        )
    value = dequantize_blocks(weight, scale.reshape(grid), block)
    return LinearShard(linear.name, "bf16", None, {"weight": value})


def dequantize_blocks(weight_NK: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[N, K] BF16. scale: [ceil(N/b), ceil(K/k)], one value for each block of `block` = (b, k)."""
    value = torch.empty_like(weight_NK, dtype=torch.bfloat16)
    rows, columns = weight_NK.shape
    height = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for top in range(0, rows, height):
        stop = min(rows, top + height)
        of_row = scale[torch.arange(top, stop, device=scale.device) // block[0]].float()
        spread = of_row.repeat_interleave(block[1], dim=1)[:, :columns]
        value[top:stop] = weight_NK[top:stop].float().mul_(spread)
    return value
