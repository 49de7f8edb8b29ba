"""A layer's forward pass on the meta device: which of a backend's kernels refuses which shapes, with no tensor at hand.

Shapes: T tokens, H hidden_size, L the rank's share of intermediate_size, R tp_size.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from reshard.errors import ReshardError
from reshard.model.activation import Activation
from reshard.schemes.table import UNQUANTIZED, scheme_named
from reshard.tensors.dtypes import TORCH
from reshard_runtime.kernels import Kernels
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import LayerShard, LinearShard


@dataclass(frozen=True)
class Linear:
    """One rank's part of a linear: dtype (as safetensors names it) and shape by suffix."""

    name: str
    scheme: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def forward_on_meta(
    linears: Sequence[Linear],
    tp_size: int,
    sizes: tuple[int, int],
    kernels: Kernels,
    tokens: Iterable[int],
    activation: Activation,
) -> str | None:
    """What refuses the forward of T tokens a rank, in one line; None where nothing does.

    linears: weights [2L, H] and [H, L]; sizes: H and I. A scheme that `kernels` lacks is run as BF16, as the
    loader leaves it.
    """
    try:
        hidden_size, share = linears[-1].tensors["weight"][1]
        first, last = (_shard(linear, kernels) for linear in linears)
        layer = LayerShard(0, 0, tp_size, *sizes, share, "", first, last, activation)
        ffn = PartialFFN(layer, kernels, _dtype(linears[-1]), "dynamic")
        for count in tokens:
            rows_TW = ffn.pack(torch.empty(count, hidden_size, dtype=ffn.dtype, device="meta"))
            result = ffn.forward_packed(rows_TW.repeat(tp_size, 1), ffn.dtype)
            if tuple(result.shape) != (count * tp_size, hidden_size):
                return f"{count} tokens of {tp_size} ranks give {list(result.shape)}, not [.., {hidden_size}]"
    except (RuntimeError, ValueError, TypeError, ReshardError) as error:  # as shape functions raise
        return str(error).splitlines()[0]
    return None


def _shard(linear: Linear, kernels: Kernels) -> LinearShard:
    scheme, described = linear.scheme, linear.tensors
    if kernels.name not in scheme_named(scheme, linear.name).native:
        scheme, described = UNQUANTIZED, {"weight": ("BF16", linear.tensors["weight"][1])}
    tensors = {
        suffix: torch.empty(shape, dtype=getattr(torch, TORCH[dtype]), device="meta")
        for suffix, (dtype, shape) in described.items()
    }
    return LinearShard(linear.name, scheme, None, tensors)


def _dtype(linear: Linear) -> torch.dtype | None:
    """deq_scale is stored as I64 for FP16 models; else the weights say it, or it is BF16."""
    stored = linear.tensors.get("deq_scale")
    return torch.float16 if stored is not None and stored[0] == "I64" else None
