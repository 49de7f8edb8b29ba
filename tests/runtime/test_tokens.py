"""Which rows a pass multiplies."""

import torch

from reshard_runtime.tokens import TokenLayout, token_layout


def test_padding_is_not_multiplied_where_counts_differ() -> None:
    layout = token_layout(2, 3, [2, 0, 1], None)
    assert layout == TokenLayout(rows=2, counts=(2, 0, 1), dense=False)
    rows_RPW = torch.arange(6.0)[:, None]
    assert layout.drop_padding(rows_RPW)[:, 0].tolist() == [0, 1, 4]
    assert layout.restore_padding(torch.tensor([[7.0], [8.0], [9.0]]))[:, 0].tolist() == [7, 8, 0, 0, 9, 0]


def test_fixed_rows_are_all_multiplied() -> None:
    assert token_layout(1, 2, [1, 0], 4) == TokenLayout(rows=4, counts=(4, 4), dense=True)
    assert token_layout(3, 2, None, None) == TokenLayout(rows=3, counts=(3, 3), dense=True)
