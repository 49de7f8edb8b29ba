"""What a device's kernels ask of a rank's matrices: whole tiles, and no dim above a limit.

L the rank's share of what is shared out (of intermediate_size, say), H hidden_size. Weights are stored [out, in] and
held [in, out], contiguous, by `reshard_runtime` as by vLLM on Ascend: n stacked column-parallel linears as [H, n·L], a
row-parallel one as [L, H]. Tiles are of that.

FRACTAL_NZ's are 16 x 16 for BF16 and 16 x 32 for INT8; npu_quant_matmul takes last dims up to 65535, of the tokens
[T, in] and of the weight. Source: CANN, aclnnQuantMatmulWeightNz (transposeX2 false: k0 = 16, n0 = 32).
"""

from collections.abc import Iterator, Sequence
from math import gcd

from reshard.model.parts import DENSE_FFN, Module, Parallel

LAST_DIM_LIMIT = 65_535
"""Of npu_quant_matmul's operands."""

TILES = {"BF16": ("BF16", (16, 16)), "F16": ("FP16", (16, 16)), "I8": ("INT8", (16, 32))}
"""FRACTAL_NZ's number and tile (rows, columns) by the weight's type."""


def tile_faults(module: Module, share: int, hidden_size: int, tile: Sequence[int], number: str) -> Iterator[str]:
    """A line for each of L = `share` and H for which a module's weight is no whole tiles of (rows, columns)."""
    rows, columns = tile
    shared_out = columns // gcd(columns, len(module.roles))  # n·L is a multiple of the columns where L is one of these
    share_unit, hidden_unit = (shared_out, rows) if module.parallel is Parallel.COLUMN else (rows, columns)
    tiles = f"{module.name} is no whole {rows} x {columns} tiles of {number} and would be padded"
    if share % share_unit:
        wrong = f"{_shared(module)}/R = {share} is no multiple of {share_unit}"
        yield f"{wrong}: {tiles}; a group size that makes it one avoids that"
    if hidden_size % hidden_unit:
        yield f"hidden_size = {hidden_size} is no multiple of {hidden_unit}: {tiles}, whatever the group size"


def _shared(module: Module) -> str:
    role = module.roles[0]
    size = role.out if module.parallel is Parallel.COLUMN else role.in_
    return "I" if size == DENSE_FFN.size else size


def limit_faults(module: Module, share: int, hidden_size: int, limit: int) -> Iterator[str]:
    """A line for each dim of a module's int8 weight that is above the kernel's limit."""
    wide = share * len(module.roles)
    if wide > limit:
        yield f"{module.name} is {wide} wide, the int8 kernel takes up to {limit}: cut it for a larger group"
    if hidden_size > limit:
        yield (
            f"hidden_size is {hidden_size}, the int8 kernel takes up to {limit}, whatever the group size; BF16 has no "
            "such limit"
        )
