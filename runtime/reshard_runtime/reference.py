"""The unsplit layer, put together from every rank's part: what a split result is compared with.

Shapes: T tokens, H hidden_size, I' intermediate_size with its padding, if any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from reshard.errors import ShardError
from reshard_runtime.kernels.torch_ops import gated
from reshard_runtime.shard import LayerShard, LinearShard

_ROW_BLOCK = 1024

_OF_INPUT = {"input_scale", "input_offset", "input_zero_point"}


def unsplit(layers: Sequence[LayerShard]) -> LayerShard:
    """The layer as the one rank of a group of 1 holds it. layers: every rank's part, by rank."""
    first = layers[0]
    if [layer.tp_rank for layer in layers] != list(range(first.tp_size)):
        raise ShardError(
            f"layer {first.index}: parts of ranks {[layer.tp_rank for layer in layers]}, wanted are all {first.tp_size}"
        )
    return replace(
        first,
        tp_size=1,
        share=first.share * first.tp_size,
        gate_up=_gate_up([layer.gate_up for layer in layers]),
        down=_down([layer.down for layer in layers]),
    )


def _gate_up(parts: Sequence[LinearShard]) -> LinearShard:
    """Every rank's gate rows, then every rank's up rows."""

    def stack(suffix: str) -> torch.Tensor:
        halves = [part.tensors[suffix].chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])

    first = parts[0].tensors
    return replace(parts[0], tensors={s: first[s] if s in _OF_INPUT else stack(s) for s in first})


def _down(parts: Sequence[LinearShard]) -> LinearShard:
    tensors = dict(parts[0].tensors)
    tensors["weight"] = torch.cat([part.tensors["weight"] for part in parts], dim=1)
    if "quant_bias" in tensors:
        tensors["quant_bias"] = torch.stack([part.tensors["quant_bias"] for part in parts]).sum(0, dtype=torch.int32)
    return replace(parts[0], tensors=tensors)


def exact(layer: LayerShard, x_TH: torch.Tensor) -> torch.Tensor:
    """down(act(gate x) * up x) [T, H] in float64, tokens not quantized, of weights as they are or dequantized.

    layer: an unsplit one, on the CPU.
    """
    h_T2I = _product(layer.gate_up, x_TH.double())
    return _product(layer.down, gated(layer.known_activation())(h_T2I))


def _product(linear: LinearShard, x_TK: torch.Tensor) -> torch.Tensor:
    return torch.cat([x_TK @ rows.t() for rows in _rows(linear)], dim=-1)


def _rows(linear: LinearShard) -> Iterator[torch.Tensor]:
    """The weight in float64, some rows at a time."""
    weight = linear.tensors["weight"]
    for top in range(0, len(weight), _ROW_BLOCK):
        rows = weight[top : top + _ROW_BLOCK].double()
        yield rows if linear.scheme == "bf16" else rows * _scale(linear)[top : top + _ROW_BLOCK, None]


def _scale(linear: LinearShard) -> torch.Tensor:
    """weight_scale [N]; where only deq_scale = input_scale * weight_scale is stored, from that."""
    tensors = linear.tensors
    if "weight_scale" in tensors:
        return tensors["weight_scale"].reshape(-1).double()
    stored = tensors["deq_scale"]
    if stored.dtype == torch.int64:  # the float32's bits
        stored = stored.to(torch.int32).view(torch.float32)
    return stored.double() / tensors["input_scale"].double()
