"""Whether a cut's local matrices are whole tiles of the device, and whole scale blocks.

Tiles and limits: see `reshard.tensors.tiles`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from reshard.estimate.profile import Alignment
from reshard.estimate.step import Way
from reshard.model.naming import DOWN, GATE_UP
from reshard.tensors.tiles import limit_faults, tile_faults

SCALE_BLOCK = 128  # of FP8 and INT8 block checkpoints: DeepSeek-V3's `weight_block_size`


@dataclass(frozen=True)
class Verdict:
    """tiles: None where the device has none. blocks: of 128, which only block-scaled checkpoints need.

    padding: what kernels would pad; too_wide: why the int8 kernel refuses the matrices, a line each.
    """

    tiles: bool | None
    blocks: bool
    padding: tuple[str, ...] = ()
    too_wide: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """All that is to be said."""
        return (*self.padding, self.too_wide) if self.too_wide else self.padding


def verdict(alignment: Alignment | None, share: int, hidden_size: int, ways: Iterable[tuple[Way, Way]]) -> Verdict:
    """The verdict for L = `share` and H = `hidden_size`; ways: how each layer's gate_up_proj and down_proj are run."""
    blocks = share % SCALE_BLOCK == 0
    if alignment is None:
        return Verdict(None, blocks)
    padding: list[str] = []
    too_wide: list[str] = []
    for role, way in dict.fromkeys(item for pair in ways for item in zip((GATE_UP, DOWN), pair, strict=True)):
        number, tile = ("BF16", alignment.bf16_tile) if way == "bf16" else ("INT8", alignment.int8_tile)
        padding += tile_faults(role, share, hidden_size, tile, number)
        if way != "bf16" and alignment.last_dim_limit is not None:
            too_wide += limit_faults(role, share, hidden_size, alignment.last_dim_limit)
    return Verdict(not padding, blocks, tuple(dict.fromkeys(padding)), next(iter(too_wide), None))
