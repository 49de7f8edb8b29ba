"""That a forward with fixed rows can be captured in a graph: nothing waits for the device, whatever the tokens.

On the meta device, by the CUDA backend, in a group whose collectives are only counted: there are no values, so an
operation that asked for one would fail, and what is made on the host or copied from there would show as another device.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reshard.model.activation import GELU, SILU, Activation
from reshard_runtime import DenseFFN
from reshard_runtime.kernels.cuda import CudaKernels
from reshard_runtime.linear import Mix
from reshard_runtime.shard import LayerShard, LinearShard

HIDDEN, SHARE, RANKS, ROWS = 64, 16, 4, 8


class Operations(TorchDispatchMode):
    """Which ran, with the sizes of what they gave, and on which devices their tensors were."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, list[tuple[int, ...]]]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        self.devices |= {tensor.device.type for tensor in tensors}
        given = [tuple(value.shape) for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.ran.append((func.name(), given))
        return result


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def _linear(scheme: str, rows: int, columns: int) -> LinearShard:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if scheme == "bf16":
        return LinearShard("m", scheme, None, {"weight": empty(rows, columns, dtype=torch.bfloat16)})
    tensors = {"weight": empty(rows, columns, dtype=torch.int8)}
    if scheme != "w8a8_static":
        tensors |= {"weight_scale": empty(rows, 1), "weight_offset": empty(rows, 1)}
    if scheme != "w8a8_dynamic":
        tensors |= {"input_scale": empty(1), "input_offset": empty(1), "deq_scale": empty(rows)}
        tensors["quant_bias"] = empty(rows, dtype=torch.int32)
    return LinearShard("m", scheme, None, tensors)


def _layer(scheme: str, activation: Activation) -> LayerShard:
    linears = _linear(scheme, 2 * SHARE, HIDDEN), _linear(scheme, HIDDEN, SHARE)
    return LayerShard(0, 1, RANKS, HIDDEN, SHARE * RANKS, SHARE, "", *linears, activation)


def _tokens(count: int) -> torch.Tensor:
    return torch.empty(count, HIDDEN, dtype=torch.bfloat16, device="meta")


def _operations(ffn: DenseFFN, count: int, **counts: Any) -> Operations:
    with Operations() as seen:
        y_TH = ffn(_tokens(count), **counts)
    assert (tuple(y_TH.shape), y_TH.dtype) == ((count, HIDDEN), torch.bfloat16)
    return seen


@pytest.mark.parametrize("activation", [Activation(SILU), Activation(GELU, 7.0)], ids=str)
@pytest.mark.parametrize("deal", ["scattered", "replicated"])
@pytest.mark.parametrize(
    ("scheme", "mix"),
    [
        ("bf16", "dynamic"),
        ("w8a8_dynamic", "dynamic"),
        ("w8a8_static", "dynamic"),
        ("w8a8_mix", "dynamic"),
        ("w8a8_mix", "static"),
    ],
)
def test_with_fixed_rows_nothing_waits_for_the_device(
    group: dist.ProcessGroup, scheme: str, mix: Mix, deal: Any, activation: Activation
) -> None:
    ffn = DenseFFN(_layer(scheme, activation), group, tokens=deal, max_tokens=ROWS, mix=mix, kernels=CudaKernels())
    few, more = _operations(ffn, 1), _operations(ffn, ROWS - 1)
    assert few.devices == more.devices == {"meta"}
    own = {name for name, _ in few.ran if name.startswith("c10d::")}
    travels = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}
    assert own == (travels if deal == "scattered" else {"c10d::allreduce_"})
    # Of the tokens themselves there are as many as there are, of all else always the same.
    sizes = [[given for name, given in seen.ran] for seen in (few, more)]
    different = [(one, other) for one, other in zip(*sizes, strict=True) if one != other]
    assert all({len(shape) and shape[0] for shape in one} == {1} for one, _ in different)
    assert all({len(shape) and shape[0] for shape in other} == {ROWS - 1} for _, other in different)


def test_what_waits_is_seen(group: dist.ProcessGroup) -> None:
    """The comparison of counts, which is no part of a graph, asks the device for values."""
    ffn = DenseFFN(_layer("bf16", Activation(SILU)), group, max_tokens=ROWS, check_counts=True, kernels=CudaKernels())
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        _operations(ffn, 3)
