"""Layers of random values, unsplit and as the ranks hold them, made on the device; no file is needed for them.

Shapes: T tokens, H hidden_size, I intermediate_size, R ranks, L = I/R. Weights are such that gate and up are about
normal, whatever the sizes.
"""

from dataclasses import dataclass, replace

import torch

from reshard.model.activation import SILU, Activation
from reshard_runtime.shard import LayerShard, LinearShard

SCHEMES = ("bf16", "w8a8_dynamic", "w8a8_static")
_RANGE = 127
_DEVIATION = 73.6  # of integers that are uniform in -127..127
# Static scales: tokens reach about 4.5, what is between the matrices about 8. With a zero point, which gives a bias.
_INPUT_SCALES, _ZERO_POINT = (5 / _RANGE, 8 / _RANGE), 3


@dataclass(frozen=True)
class Sizes:
    """tokens: how many at once, in the checks; max_tokens: rows of a graph; decode: tokens a rank, where it is timed.

    scale: of DeepSeek-R1's sizes. rounds: of what is timed.
    """

    hidden: int
    intermediate: int
    ranks: int
    tokens: tuple[int, ...]
    max_tokens: int
    decode: tuple[int, ...]
    scale: str
    rounds: int

    @property
    def share(self) -> int:
        """L"""
        return self.intermediate // self.ranks


R1 = Sizes(7168, 18432, 8, (1, 2, 16, 17, 24, 64, 512, 4096), 24, (1, 24, 64), "1", 20)
SMALL = Sizes(448, 1152, 8, (1, 16, 17), 8, (1,), "1/16", 1)


@dataclass(frozen=True)
class Layer:
    """An unsplit layer by linear: gate_up [2I, H], down [H, I]."""

    scheme: str
    sizes: Sizes
    gate_up: LinearShard
    down: LinearShard

    def shard(self, rank: int, ranks: int) -> LayerShard:
        """A rank's part. The slices are cut here, by none of the project's code."""
        share = self.sizes.intermediate // ranks
        own = slice(rank * share, (rank + 1) * share)
        gate_up = {name: _rows(value, own) for name, value in self.gate_up.tensors.items()}
        down = {**self.down.tensors, "weight": self.down.tensors["weight"][:, own].contiguous()}
        linears = replace(self.gate_up, tensors=gate_up), replace(self.down, tensors=down)
        hidden, intermediate = self.sizes.hidden, self.sizes.intermediate
        return LayerShard(0, rank, ranks, hidden, intermediate, share, "", *linears, Activation(SILU))

    def to(self, device: str) -> "Layer":
        """The same tensors there."""
        gate_up, down = (
            replace(one, tensors={name: value.to(device) for name, value in one.tensors.items()})
            for one in (self.gate_up, self.down)
        )
        return replace(self, gate_up=gate_up, down=down)


def _rows(value_2I: torch.Tensor, own: slice) -> torch.Tensor:
    """The rank's rows of gate, then the same of up; what is one value for all rows stays."""
    if len(value_2I) == 1:
        return value_2I
    gate_I, up_I = value_2I.chunk(2)
    return torch.cat([gate_I[own], up_I[own]])


def make_layer(scheme: str, sizes: Sizes, generator: torch.Generator) -> Layer:
    """A layer on the generator's device."""
    shapes = ((2 * sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate))
    gate_up, down = (
        LinearShard(name, scheme, None, _tensors(scheme, shape, input_scale, generator))
        for name, shape, input_scale in zip(("gate_up_proj", "down_proj"), shapes, _INPUT_SCALES, strict=True)
    )
    return Layer(scheme, sizes, gate_up, down)


def _tensors(
    scheme: str, shape: tuple[int, int], input_scale: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    rows, columns = shape
    if scheme == "bf16":
        return {"weight": floats(generator, rows, columns).mul_(columns**-0.5)}
    device = generator.device
    scale = torch.rand(rows, 1, generator=generator, device=device).add_(0.5).div_(_DEVIATION * columns**0.5)
    found = {"weight": integers(generator, rows, columns), "weight_scale": scale}
    if scheme == "w8a8_static":
        found |= {
            "weight_scale": scale.bfloat16(),
            "input_scale": torch.full((1,), input_scale, dtype=torch.bfloat16, device=device),
            "input_zero_point": torch.full((1,), _ZERO_POINT, dtype=torch.int8, device=device),
        }
    return found


def integers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Uniform int8 in -127..127."""
    return torch.randint(-_RANGE, _RANGE + 1, shape, generator=generator, device=generator.device, dtype=torch.int8)


def floats(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal, BF16."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
