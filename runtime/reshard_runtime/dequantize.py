"""Weights that a device has no kernel for, as BF16.

value = stored * scale of its channel or block, in float32, rounded once to BF16 (DeepSeek-V3 `inference/kernel.py`,
weight_dequant; compressed-tensors `dequantize`). Tokens are not quantized, nor is a static `input_scale` applied, which
says how an engine's FP8 kernel would round them. Shapes: [N, K] a weight, b x k its scale block.
"""

import logging
from collections.abc import Iterable
from functools import partial

import torch

from reshard.errors import ShardError
from reshard.schemes.table import UNQUANTIZED, Arithmetic, Operand, scheme_named, variant_with
from reshard_runtime.kernels import Kernels
from reshard_runtime.linear import operands
from reshard_runtime.shard import LayerShard, LinearShard

_log = logging.getLogger(__name__)
_CHUNK_ELEMENTS = 1 << 22
_GIB = 1 << 30


def dequantized(layers: Iterable[LayerShard], kernels: Kernels) -> dict[int, LayerShard]:
    """The layers with every linear in a scheme that `kernels` has; one line of the log for all that were changed.

    They are taken one at a time: of one alone there is both what is stored and what is held.
    """
    found: dict[int, LayerShard] = {}
    schemes: list[str] = []
    stored = held = 0
    for layer in layers:
        found[layer.index] = layer.changed(partial(_linear, kernels=kernels))
        for before, after in zip(layer.linears, found[layer.index].linears, strict=True):
            if before is not after:
                schemes.append(before.scheme)
                stored, held = stored + before.nbytes, held + after.nbytes
    if schemes:
        _log.warning(
            "%s has no kernel for %s: %d linears are held as BF16, %.3f GiB instead of %.3f",
            kernels.name,
            ", ".join(sorted(set(schemes))),
            len(schemes),
            held / _GIB,
            stored / _GIB,
        )
    return found


def _linear(linear: LinearShard, kernels: Kernels) -> LinearShard:
    scheme = scheme_named(linear.scheme, linear.name)
    if kernels.name in scheme.native:
        return linear
    if scheme.arithmetics != (Arithmetic.SCALED,):
        raise ShardError(f"{linear.name}: {kernels.name} has no kernel for {scheme.name}")
    variant, of = variant_with(linear.scheme, linear.tensors.keys(), linear.name), operands(linear)
    weight, scale = of[Operand.WEIGHT], of[Operand.SCALE]
    if variant.in_blocks and linear.block is None:
        raise ShardError(f"{linear.name}: {linear.scheme}, and manifest.json gives no block size; cut the set again")
    # One for each row, or one each for gate and up, or one for all.
    block = (
        linear.block if variant.in_blocks and linear.block else (max(1, len(weight) // scale.numel()), weight.shape[1])
    )
    grid = [-(-size // extent) for size, extent in zip(weight.shape, block, strict=True)]
    if scale.numel() != grid[0] * grid[1]:
        raise ShardError(
            f"{linear.name}: a scale of {list(scale.shape)} for a weight of {list(weight.shape)} in blocks of "
            f"{list(block)}, expected {grid}; cut the set again"
        )
    value = dequantize_blocks(weight, scale_values(scale).reshape(grid), block)
    return LinearShard(linear.name, UNQUANTIZED, None, {"weight": value})


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """A scale's values; of one byte it is the exponent of 2, biased by 127, and 255 is NaN (OCP MX, E8M0)."""
    if scale.element_size() > 1:
        return scale.float()
    exponents = scale.view(torch.uint8).to(torch.int32)
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 127).masked_fill_(
        exponents == 255, float("nan")
    )


def dequantize_blocks(weight_NK: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[N, K] BF16. scale: float32 [ceil(N/b), ceil(K/k)], one value for each block of `block` = (b, k)."""
    value = torch.empty_like(weight_NK, dtype=torch.bfloat16)
    rows, columns = weight_NK.shape
    height = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for top in range(0, rows, height):
        stop = min(rows, top + height)
        of_row = scale[torch.arange(top, stop, device=scale.device) // block[0]]
        spread = of_row.repeat_interleave(block[1], dim=1)[:, :columns]
        value[top:stop] = weight_NK[top:stop].float().mul_(spread)
    return value
