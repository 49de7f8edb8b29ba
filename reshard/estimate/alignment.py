"""Whether a cut's local matrices are whole tiles of the device, and whole scale blocks.

The matrices are [2L, H] and [H, L] as they are stored, and transposed on the device: both L and H are held against
both sides of the tile. So W8A8 on Ascend wants multiples of 32, BF16 of 16.
"""

from dataclasses import dataclass
from math import lcm

from reshard.estimate.profile import Alignment
from reshard.estimate.step import Way

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


def verdict(alignment: Alignment | None, share: int, hidden_size: int, ways: frozenset[Way]) -> Verdict:
    """The verdict for L = `share` and H = `hidden_size`; ways: how the layers' linears are run."""
    blocks = share % SCALE_BLOCK == 0
    if alignment is None:
        return Verdict(None, blocks)
    tiles = {way: alignment.bf16_tile if way == "bf16" else alignment.int8_tile for way in ways}
    padding = []
    for way in sorted(tiles):
        unit = lcm(*tiles[way])
        number = "BF16" if way == "bf16" else "INT8"
        padding += [
            f"{what} = {size} is not a multiple of {unit}: the {' x '.join(map(str, tiles[way]))} tiles of {number} "
            "would be padded"
            for what, size in (("I/R", share), ("hidden_size", hidden_size))
            if size % unit
        ]
    limit, widest, too_wide = alignment.last_dim_limit, max(2 * share, hidden_size), None
    if limit is not None and ways != {"bf16"} and widest > limit:
        too_wide = f"a matrix is {widest} wide, the int8 kernel takes up to {limit}: cut it for a larger group"
    return Verdict(not padding, blocks, tuple(padding), too_wide)
