"""CPU: oneDNN where the processor has what it needs (AVX-512, VNNI), else float32 products of tiles."""

from collections.abc import Iterator

import torch

from reshard_runtime.collectives import Collectives, PairwiseCollectives
from reshard_runtime.kernels.base import Kernels

# A tile of the weight as float32, 4 MB: it stays in the cache between the conversion and the product (measured from
# 1 to 8 MB), and each product is long enough to hide its call.
_TILE_ELEMENTS = 1 << 20
# Products of int8 are at most 2^14, and float32 adds integers exactly up to 2^24: so 2^10 of them.
_EXACT_COLUMNS = 1 << 10
# Up to here torch's own product is faster than converting tiles, where oneDNN has none.
_FEW_TOKENS = 2
# oneDNN's int8 product of one token is 2.4 times as fast as that of two: up to here it is called for each (0.64 of the
# time for 2 tokens, 0.85 for 4, 1.25 for 8), on so many rows of the weight a thread that they stay in the cache.
_FEW_INT8_TOKENS = 4
_CACHED_ROWS = 512


class CpuKernels(Kernels):
    """Shapes: see `reshard_runtime.kernels.base`."""

    name = "cpu"

    def __init__(self, *, onednn: frozenset[torch.dtype] | None = None) -> None:
        """onednn: the types that oneDNN multiplies on this processor; None asks torch."""
        self._onednn = _onednn() if onednn is None else onednn

    def collectives(self, group: torch.distributed.ProcessGroup) -> Collectives:
        return PairwiseCollectives(group)

    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x_TK.dtype in self._onednn and len(x_TK) == 1:
            # torch gives a single token to a product that takes 1.19 times as long as oneDNN's of two.
            return torch.nn.functional.linear(x_TK.expand(2, -1), weight)[:1]
        if x_TK.dtype == torch.float32 or x_TK.dtype in self._onednn or len(x_TK) <= _FEW_TOKENS:
            return torch.nn.functional.linear(x_TK, weight)
        y_TN = x_TK.new_empty(len(x_TK), len(weight))
        x_TK = x_TK.float()
        for rows, tile in _tiles(weight):
            y_TN[:, rows] = x_TK @ tile.t()
        return y_TN

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if torch.int8 in self._onednn and weight.shape[1] > 1:  # of a single column torch 2.13 makes no product
            return _onednn_int8(q_TK, weight)
        sums_TN = torch.zeros(len(q_TK), len(weight), dtype=torch.int32)
        parts = [part.contiguous() for part in q_TK.float().split(_EXACT_COLUMNS, dim=1)]
        for rows, tile in _tiles(weight):
            for part, columns in zip(parts, tile.split(_EXACT_COLUMNS, dim=1), strict=True):
                sums_TN[:, rows] += (part @ columns.t()).to(torch.int32)
        return sums_TN


def _onednn_int8(q_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """[T, N] int32."""
    if not 1 < len(q_TK) <= _FEW_INT8_TOKENS:
        return torch._int_mm(q_TK, weight_NK.t())
    sums_TN = torch.empty(len(q_TK), len(weight_NK), dtype=torch.int32)
    height = _CACHED_ROWS * torch.get_num_threads()
    for top in range(0, len(weight_NK), height):
        rows = weight_NK[top : top + height]
        for token in range(len(q_TK)):
            sums_TN[token : token + 1, top : top + height] = torch._int_mm(q_TK[token : token + 1], rows.t())
    return sums_TN


def _onednn() -> frozenset[torch.dtype]:
    """AVX-512 or better for BF16 and FP16, VNNI or AMX for int8: what torch asks before it calls oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        torch.int8: torch.cpu._is_vnni_supported(),
    }
    return frozenset(dtype for dtype, there in has.items() if there)


def _tiles(weight_NK: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, these rows as float32), all through one buffer."""
    height = max(1, _TILE_ELEMENTS // weight_NK.shape[1])
    buffer = torch.empty(min(height, len(weight_NK)), weight_NK.shape[1])
    for top in range(0, len(weight_NK), height):
        rows = weight_NK[top : top + height]
        yield slice(top, top + len(rows)), buffer[: len(rows)].copy_(rows)
