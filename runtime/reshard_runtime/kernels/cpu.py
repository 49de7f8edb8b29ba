"""CPU: oneDNN's products of packed weights where the processor has what they need, else float32 products of tiles."""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from reshard_runtime.collectives import Collectives, LinkedCollectives, PairwiseCollectives
from reshard_runtime.kernels.base import Kernels
from reshard_runtime.links import links_of

Int8Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens, and a weight that `_packed_int8` packed -> sums, exact and then rounded once to float32."""

# A tile of the weight as float32, 4 MB: it stays in the cache between the conversion and the product (measured from
# 1 to 8 MB), and each product is long enough to hide its call.
_TILE_ELEMENTS = 1 << 20
# Float32 adds integers exactly up to here; products of int8 are at most 2^14, so 2^10 of them can be added.
_EXACT_SUM = 1 << 24
_EXACT_COLUMNS = 1 << 10
# Up to here torch's own product is faster than converting tiles, where oneDNN has none.
_FEW_TOKENS = 2


class CpuKernels(Kernels):
    """Shapes: see `reshard_runtime.kernels.base`."""

    name = "cpu"

    def __init__(self, *, onednn: bool = True) -> None:
        """onednn: whether to use what it has for this processor."""
        self._float_types = _float_types() if onednn else frozenset()
        self._packs_bf16 = onednn and _packs_bf16()
        self._int8_product = _int8_product() if onednn else None

    def collectives(self, group: torch.distributed.ProcessGroup) -> Collectives:
        return PairwiseCollectives(group) if links_of(group) is None else LinkedCollectives(group)

    def weight(self, name: str, weight_NK: torch.Tensor) -> torch.Tensor:
        """Packed in oneDNN's order, of the same size, where it multiplies that faster."""
        if weight_NK.is_meta:
            return weight_NK
        if weight_NK.dtype == torch.int8 and self._int8_product is not None:
            return _packed_int8(weight_NK)
        if weight_NK.dtype == torch.bfloat16 and self._packs_bf16:
            return torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), None)
        return weight_NK

    def linear(self, x_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x_TK, weight, None, "none", [], "")
        if x_TK.dtype in self._float_types and len(x_TK) == 1:
            # torch gives a single token to a product that takes 1.19 times as long as oneDNN's of two.
            return torch.nn.functional.linear(x_TK.expand(2, -1), weight)[:1]
        if x_TK.dtype == torch.float32 or x_TK.dtype in self._float_types or len(x_TK) <= _FEW_TOKENS:
            return torch.nn.functional.linear(x_TK, weight)
        y_TN = x_TK.new_empty(len(x_TK), len(weight))
        x_TK = x_TK.float()
        for rows, tile in _tiles(weight):
            y_TN[:, rows] = x_TK @ tile.t()
        return y_TN

    def int8_matmul(self, q_TK: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[T, N], exact: float32 where that holds every sum, else int32."""
        if not weight.is_mkldnn or self._int8_product is None:
            return _int8_of_tiles(q_TK, weight)
        sums_TN = self._int8_product(q_TK, weight)
        least, most = torch.aminmax(sums_TN)
        if max(-float(least), float(most)) < _EXACT_SUM:
            return sums_TN
        return _int8_of_tiles(q_TK, weight.to_dense().t())


def _float_types() -> frozenset[torch.dtype]:
    """Those that oneDNN multiplies here (AVX-512 or better): what torch asks before it calls it."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, there in has.items() if there)


def _packs_bf16() -> bool:
    """Whether packed BF16 weights are multiplied faster: not where BF16 has no instruction of its own."""
    return torch.bfloat16 in _float_types() and torch.cpu._is_avx512_bf16_supported()


@cache
def _int8_product() -> Int8Product | None:
    """The fastest of oneDNN's products of packed int8 on this processor; None where tiles are faster.

    Which instructions it may use is not the processor's matter alone, and without them a product is hundreds of times
    slower, or saturates: so each is tried, with sums of every size.
    """
    seconds: dict[Int8Product | None, float] = {}
    q_TK, weight_NK = (torch.ones(rows, 1023, dtype=torch.int8) for rows in (2, 1024))
    for product in (_signed, _shifted):
        if _is_exact(product):
            seconds[product] = _seconds(partial(product, q_TK, _packed_int8(weight_NK)))
    if seconds:
        seconds[None] = _seconds(partial(_int8_of_tiles, q_TK, weight_NK))
    return min(seconds, key=lambda product: seconds[product], default=None)


def _is_exact(product: Int8Product) -> bool:
    """As far as float32 is, for the largest sums, and for few tokens and many."""
    values = torch.arange(32 * 4095).reshape(32, 4095)
    q_TK, weight_NK = (values % 251 - 125).to(torch.int8), (values[:8] % 239 - 119).to(torch.int8)
    q_TK[0] = weight_NK[0] = 127
    q_TK[1] = weight_NK[1, ::2] = -128
    exact = _int8_of_tiles(q_TK, weight_NK).float()
    try:
        packed = _packed_int8(weight_NK)
        return all(torch.equal(product(q_TK[:few], packed), exact[:few]) for few in (1, 2, len(q_TK)))
    except (RuntimeError, AttributeError):  # this torch has no such product
        return False


def _seconds(call: Callable[[], object]) -> float:
    """Of the second call: the first makes what all later ones use."""
    call()
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _packed_int8(weight_NK: torch.Tensor) -> torch.Tensor:
    """[K, N] by its shape."""
    return torch.ops.onednn.qlinear_prepack(weight_NK.contiguous(), None)


def _signed(q_TK: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return _qlinear(q_TK, 0, packed)


def _shifted(q_TK: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Of q + 128, without a sign; oneDNN takes the 128 away again. VNNI alone has only such products."""
    return _qlinear(q_TK.view(torch.uint8) ^ 128, 128, packed)


def _qlinear(q_TK: torch.Tensor, zero: int, packed: torch.Tensor) -> torch.Tensor:
    one, none = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        q_TK, 1.0, zero, packed, one, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _int8_of_tiles(q_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """[T, N] int32."""
    sums_TN = torch.zeros(len(q_TK), len(weight_NK), dtype=torch.int32)
    parts = [part.contiguous() for part in q_TK.float().split(_EXACT_COLUMNS, dim=1)]
    for rows, tile in _tiles(weight_NK):
        for part, columns in zip(parts, tile.split(_EXACT_COLUMNS, dim=1), strict=True):
            sums_TN[:, rows] += (part @ columns.t()).to(torch.int32)
    return sums_TN


def _tiles(weight_NK: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, these rows as float32), all through one buffer."""
    height = max(1, _TILE_ELEMENTS // weight_NK.shape[1])
    buffer = torch.empty(min(height, len(weight_NK)), weight_NK.shape[1], dtype=torch.float32)
    for top in range(0, len(weight_NK), height):
        rows = weight_NK[top : top + height]
        yield slice(top, top + len(rows)), buffer[: len(rows)].copy_(rows)
