"""CUDA graphs of the whole forward: a capture fails where anything waits for the host, or asks for its memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from reshard_runtime import DenseFFN
from reshard_runtime.collectives import Collectives
from reshard_runtime.kernels.cuda import CudaKernels
from tests.cuda.forward import group_of_one
from tests.cuda.kernels import BF16
from tests.cuda.layers import Layer, floats
from tests.cuda.report import Check, near

Forward = Callable[[torch.Tensor], torch.Tensor]
_WARM_UPS = 3
_REPLAYS = 3


class _Alone(Collectives):
    """A group on one device: every rank brings what this one does, and this one's partial sums are all there are."""

    def gather(self, rows_PW: torch.Tensor, out: torch.Tensor | None = None, counts: object = ()) -> torch.Tensor:
        return rows_PW.repeat(self._group.size(), 1)

    def reduce_scatter(self, partial_RPH: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return partial_RPH.chunk(self._group.size())[self._group.rank()].clone()

    def all_reduce(self, partial_PH: torch.Tensor, counts: object = ()) -> torch.Tensor:
        return partial_PH


class _AloneKernels(CudaKernels):
    def collectives(self, group: dist.ProcessGroup) -> Collectives:
        return _Alone(group)


def check_graphs(layer: Layer, generator: torch.Generator) -> Iterator[Check]:
    """One rank of all, with fixed rows; its own tokens are fewer. Then unsplit, over nccl's own collectives."""
    sizes, rank = layer.sizes, 3
    dist.init_process_group("fake", rank=rank, world_size=sizes.ranks, store=FakeStore())
    try:
        for deal in ("scattered", "replicated"):
            ffn = DenseFFN(
                layer.shard(rank, sizes.ranks),
                dist.group.WORLD,
                tokens=deal,
                max_tokens=sizes.max_tokens,
                kernels=_AloneKernels(),
            )
            for own in (1, sizes.max_tokens - 7, sizes.max_tokens):
                name = f"{layer.scheme}, {deal}, {own} of {sizes.max_tokens} rows"
                yield from _replayed(name, ffn, own, sizes.hidden, generator)
    finally:
        dist.destroy_process_group()
    whole = DenseFFN(layer.shard(0, 1), max_tokens=sizes.max_tokens)
    with group_of_one("nccl") as group:
        travel = whole.kernels.collectives(group)

        def over_nccl(x_TH: torch.Tensor) -> torch.Tensor:
            rows = travel.gather(whole.pack(x_TH))
            return travel.reduce_scatter(whole.forward_packed(rows, torch.float32)).to(whole.dtype)

        yield from _replayed(
            f"{layer.scheme}, unsplit, nccl of one", over_nccl, sizes.max_tokens, sizes.hidden, generator
        )


def _replayed(name: str, forward: Forward, own: int, hidden: int, generator: torch.Generator) -> Iterator[Check]:
    """Captured with one input, replayed with others."""
    x_TH = floats(generator, own, hidden)
    with captured(lambda: forward(x_TH)) as (replay, y_TH):
        for _ in range(_REPLAYS):
            x_TH.copy_(floats(generator, own, hidden))
            replay()
            yield near(f"graph: {name}", y_TH, forward(x_TH), BF16, BF16)


@contextmanager
def captured(call: Callable[[], torch.Tensor]) -> Iterator[tuple[Callable[[], None], torch.Tensor]]:
    """A graph's replay, and where its result stands. Raises RuntimeError where the call cannot be captured.

    The graph goes before the communicators that it holds, which would wait for that.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # libraries' handles, workspaces and communicators are made in the first call
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
        yield graph.replay, result
    finally:
        graph.reset()
