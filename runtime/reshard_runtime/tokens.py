"""How many tokens each rank brings, and the rows they take on the way.

A row is a token, or a quantized one's integers and its scale, so that one collective takes both.

Collectives want the same number of rows P from every rank: the largest count, or a fixed one for graph capture. All of
this is integers of the host, the same on every rank: nothing here waits for a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reshard.errors import TokensError

_SCALE_BYTES = 4
_MOST = 2**31 - 1


@dataclass(frozen=True)
class TokenLayout:
    """`rows` P of every rank, of which the first `counts[r]` are rank r's tokens. `dense`: there is no padding."""

    rows: int
    counts: tuple[int, ...]
    dense: bool

    @property
    def total(self) -> int:
        """Tokens of all ranks."""
        return sum(self.counts)

    def drop_padding(self, rows_RPW: torch.Tensor) -> torch.Tensor:
        """[R*P, W] -> [total, W]."""
        if self.dense:
            return rows_RPW
        return torch.cat([rows_RPW[r * self.rows : r * self.rows + count] for r, count in enumerate(self.counts)])

    def restore_padding(self, rows_TW: torch.Tensor) -> torch.Tensor:
        """[total, W] -> [R*P, W]; the padding is zero."""
        if self.dense:
            return rows_TW
        padded = rows_TW.new_zeros(len(self.counts) * self.rows, rows_TW.shape[1])
        for r, part in enumerate(rows_TW.split(self.counts)):
            padded[r * self.rows : r * self.rows + len(part)] = part
        return padded


def token_layout(own: int, tp_size: int, tokens_per_rank: Sequence[int] | None, max_tokens: int | None) -> TokenLayout:
    """The rows that all ranks bring: `max_tokens` each, else the largest count, else as many as this rank's `own`.

    With fixed rows every row is computed, padding too, so that no size depends on the counts.

    Raises TokensError as `checked` does.
    """
    counts = (own,) * tp_size if tokens_per_rank is None else checked(tokens_per_rank, tp_size, max_tokens)
    if max_tokens is not None:
        return TokenLayout(max_tokens, (max_tokens,) * tp_size, True)
    rows = max(counts)
    return TokenLayout(rows, counts, counts == (rows,) * tp_size)


def checked(tokens_per_rank: Sequence[int], tp_size: int, max_tokens: int | None) -> tuple[int, ...]:
    """The counts. Raises TokensError for what is no list of tp_size of them, or has one above max_tokens."""
    try:
        counts = tuple(tokens_per_rank)
    except TypeError:
        raise TokensError(f"tokens_per_rank is {tokens_per_rank!r}, expected a list of {tp_size} counts") from None
    if len(counts) != tp_size:
        raise TokensError(f"tokens_per_rank has {len(counts)} counts, the group has {tp_size} ranks")
    for rank, count in enumerate(counts):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MOST:
            raise TokensError(f"tokens_per_rank[{rank}] is {count!r}; a count is an integer from 0 to {_MOST}")
        if max_tokens is not None and count > max_tokens:
            raise TokensError(f"tokens_per_rank[{rank}] is {count}, the buffers are fixed for max_tokens={max_tokens}")
    return counts


def pad(x_TH: torch.Tensor, rows: int) -> torch.Tensor:
    """[T, H] -> [rows, H], zeros below."""
    if len(x_TH) == rows:
        return x_TH
    padded = x_TH.new_zeros(rows, x_TH.shape[1])
    padded[: len(x_TH)] = x_TH
    return padded


def pack(q_TH: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
    """int8 [T, H] and float32 [T] -> int8 [T, H + 4]."""
    return torch.cat([q_TH, scale_T.reshape(-1, 1).view(torch.int8)], dim=1)


def unpack(rows_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [T, H + 4] -> int8 [T, H] and float32 [T]."""
    q_TH, scale = rows_TW.split([rows_TW.shape[1] - _SCALE_BYTES, _SCALE_BYTES], dim=1)
    return q_TH.contiguous(), scale.contiguous().view(torch.float32)[:, 0]
