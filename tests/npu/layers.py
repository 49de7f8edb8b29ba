"""What the tests of layers on the NPU path share."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN, INTERMEDIATE = 256, 1024
# BF16 products are added in another order by another matmul: a rounding of h, one of the result (2^-9 each), and one
# more of each partial sum.
BF16_BOUND = 2.0**-7


class Calls(TorchDispatchMode):
    """The names of torch_npu's operators, of collectives and of `ones`, and the arguments of the format casts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.casts: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name.startswith(("npu::", "c10d::", "aten::ones")):
            self.names.append(name)
        if name == "npu::npu_format_cast":
            self.casts.append((tuple(args[0].shape), args[0].is_contiguous(), args[1]))
        return func(*args, **(kwargs or {}))


def tokens(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(rank)).to(dtype)
