"""How many rows each rank brings to the collectives of a split layer, and the tensors in which they stand.

Shapes: T this rank's tokens, P the rows that each rank brings, D the data-parallel ranks that share the layer, W what a
row is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from reshard.errors import GroupError, TokensError
from reshard_runtime.serving.vllm.groups import Group
from reshard_runtime.tokens import TokenLayout, pad, token_layout


class Rows(ABC):
    """`parts`: of how many ranks' rows a tensor is made, 1 or D."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @abstractmethod
    def layout(self, own: int, layer_name: str) -> TokenLayout:
        """What each rank brings, of `own` tokens here. Raises GroupError without counts, TokensError if none fit."""

    def place(self, name: str, rows: torch.Tensor, layout: TokenLayout, parts: int) -> torch.Tensor:
        """[at most parts * P, W] -> [parts * P, W], zeros below, for a collective to read."""
        return pad(rows, parts * layout.rows)

    def result(
        self, name: str, layout: TokenLayout, parts: int, like: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """[parts * P, W] for a collective to write; None leaves it to the collective."""
        return None

    def _misfit(self, message: str) -> TokensError:
        """What this rank raises, after the others were told."""
        self._group.tell(message)
        return TokensError(message)


class Counted(Rows):
    """As many rows as the largest of the engine's counts: `counts()`, one for each data-parallel rank, on the host."""

    def __init__(self, group: Group, counts: Callable[[], torch.Tensor | None]) -> None:
        super().__init__(group)
        self._counts = counts

    def layout(self, own: int, layer_name: str) -> TokenLayout:
        everyones = self._counts()
        first, place, size = self._group.first, self._group.data.rank(), self._group.data.size()
        if everyones is None:
            raise GroupError(
                f"{layer_name}: the engine gave no token counts of the data-parallel ranks; the layer is split over "
                f"{size} of them and cannot run without (is data_parallel_size above 1 on every rank?)"
            )
        counts = everyones[first : first + size].tolist()
        if own != counts[place]:
            raise self._misfit(f"{layer_name}, rank {place}: x has {own} tokens, the engine said {counts[place]}")
        return token_layout(own, size, counts, None)


class Fixed(Rows):
    """P rows whatever a rank has, for engines that exchange no counts: none can wait for one in another graph bucket.

    The tensors are kept: whichever bucket's graph a rank replays, it meets the others at the addresses at which all of
    them captured. The layers of a model share them: they run one after another.

    is_rehearsal: whether the engine runs no requests (`ascend.is_rehearsal`); every rank then has as many tokens as
    this one, be it more than P.
    """

    def __init__(self, group: Group, rows: int, is_rehearsal: Callable[[], bool]) -> None:
        super().__init__(group)
        self._rows, self._is_rehearsal = rows, is_rehearsal
        self._kept: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def layout(self, own: int, layer_name: str) -> TokenLayout:
        if own > self._rows and not self._is_rehearsal():
            raise self._misfit(
                f"{layer_name}: x has {own} tokens, and every rank sends {self._rows} rows; set max_tokens in "
                f"model_loader_extra_config to {own} or more on every rank"
            )
        return token_layout(own, self._group.data.size(), None, max(own, self._rows))

    def place(self, name: str, rows: torch.Tensor, layout: TokenLayout, parts: int) -> torch.Tensor:
        kept = self.result(name, layout, parts, rows, rows.dtype)
        if kept is None:
            return rows  # a rehearsal's: as many as there can be
        kept[: len(rows)] = rows
        kept[len(rows) :] = 0
        return kept

    def result(
        self, name: str, layout: TokenLayout, parts: int, like: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        # Made when it is first asked for, before any graph is captured.
        key = (name, like.shape[1], dtype)
        if key not in self._kept:
            self._kept[key] = like.new_zeros(parts * self._rows, like.shape[1], dtype=dtype)
        return self._kept[key] if layout.rows == self._rows else None
