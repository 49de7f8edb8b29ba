"""The rows that each rank sends: by the engine's counts, or a fixed number in tensors that are kept. One process."""

from types import SimpleNamespace

import pytest
import torch

from reshard.errors import GroupError, TokensError, UsageError
from reshard_runtime.serving.vllm import ascend
from reshard_runtime.serving.vllm.rows import Counted, Fixed
from reshard_runtime.tokens import TokenLayout

WIDTH = 8


class Group:
    """Data-parallel ranks 2 and 3 of 4; this is the second of them."""

    first = 2
    data = SimpleNamespace(rank=lambda: 1, size=lambda: 2)

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, message: str) -> None:
        self.told.append(message)


def _counted(*counts: int) -> Counted:
    return Counted(Group(), lambda: torch.tensor(counts, dtype=torch.int32) if counts else None)  # type: ignore[arg-type]


def _fixed(rows: int, group: Group | None = None, rehearsal: bool = False) -> Fixed:
    return Fixed(group or Group(), rows, lambda: rehearsal)  # type: ignore[arg-type]


def _rows(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, count * WIDTH + 1).reshape(count, WIDTH).to(dtype)


def test_counted_rows_are_the_groups_part_of_the_counts() -> None:
    assert _counted(9, 8, 5, 3).layout(3, "mlp") == TokenLayout(5, (5, 3), False)


def test_counted_rows_make_no_copy_where_they_fit() -> None:
    counted, x = _counted(), _rows(3)
    assert counted.place("sent", x, TokenLayout(3, (3, 3), True), 1) is x
    padded = counted.place("sent", x, TokenLayout(5, (5, 3), False), 1)
    assert torch.equal(padded, torch.cat([x, torch.zeros(2, WIDTH)]))
    assert counted.result("gathered", TokenLayout(5, (5, 3), False), 2, x, x.dtype) is None


@pytest.mark.parametrize(
    ("counts", "error", "said"),
    [
        ((), GroupError, "mlp: the engine gave no token counts"),
        ((1, 1, 5, 4), TokensError, "x has 3 tokens, the engin"),
    ],
)
def test_counts_that_are_missing_or_another_steps(counts: tuple[int, ...], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        _counted(*counts).layout(3, "mlp")


@pytest.mark.parametrize("own", [0, 1, 7, 16])
def test_fixed_rows_are_the_same_whatever_a_rank_has(own: int) -> None:
    assert _fixed(16).layout(own, "mlp") == TokenLayout(16, (16, 16), True)


def test_fixed_rows_stand_at_one_place_for_every_layer_and_step() -> None:
    """What an earlier step left below a later one's rows is gone: a kernel may take all rows' maximum."""
    fixed = _fixed(4)
    layout = fixed.layout(4, "mlp")
    first = fixed.place("sent", _rows(4), layout, 1)
    assert torch.equal(first, _rows(4))
    second = fixed.place("sent", 2 * _rows(1), layout, 1)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, torch.cat([2 * _rows(1), torch.zeros(3, WIDTH)]))
    gathered = fixed.result("gathered", layout, 2, second, second.dtype)
    assert gathered is not None
    assert gathered.shape == (8, WIDTH)
    assert fixed.result("gathered", layout, 2, second, second.dtype) is gathered
    other = fixed.place("sent", _rows(4, torch.int8), layout, 1)
    assert other.dtype == torch.int8
    assert other.data_ptr() != first.data_ptr()


def test_more_tokens_than_rows() -> None:
    """The others are told before this rank raises: it does not come to the collective."""
    group = Group()
    with pytest.raises(TokensError) as caught:
        _fixed(16, group).layout(17, "model.layers.0.mlp")
    assert group.told == [str(caught.value)]
    assert str(caught.value) == (
        "model.layers.0.mlp: x has 17 tokens, and every rank sends 16 rows; set max_tokens in "
        "model_loader_extra_config to 17 or more on every rank"
    )


def test_in_a_rehearsal_every_rank_has_as_many() -> None:
    """The engine measures its memory, or warms up. The kept tensors are made then, so that they are counted."""
    fixed, x = _fixed(4, rehearsal=True), _rows(9)
    layout = fixed.layout(9, "mlp")
    assert layout == TokenLayout(9, (9, 9), True)
    assert fixed.place("sent", x, layout, 1) is x
    assert fixed.result("gathered", layout, 2, x, x.dtype) is None
    assert {key[0]: value.shape for key, value in fixed._kept.items()} == {"sent": (4, WIDTH), "gathered": (8, WIDTH)}


def _scheduler(batched: int) -> SimpleNamespace:
    return SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=batched))


def test_where_rows_are_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _scheduler(8192)
    monkeypatch.setattr(ascend, "exchanges_counts", lambda config: True)
    assert ascend.fixed_rows(config, True, None) is None
    with pytest.raises(UsageError, match="max_tokens is 64 in model_loader_extra_config, and no rows are fixed here"):
        ascend.fixed_rows(config, True, 64)
    monkeypatch.setattr(ascend, "exchanges_counts", lambda config: False)
    monkeypatch.setattr(ascend, "most_tokens", lambda config: 24)
    monkeypatch.setattr(ascend, "_only_decodes", lambda: True)
    assert ascend.fixed_rows(config, True, None) == 24
    assert ascend.fixed_rows(config, True, 64) == 64
    assert ascend.fixed_rows(config, False, None) is None
    with pytest.raises(UsageError, match="max_tokens is 64"):
        ascend.fixed_rows(config, False, 64)


def test_rows_that_a_step_may_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-ascend exchanges no counts for prefill either where its experts' exchange takes that, too."""
    monkeypatch.setattr(ascend, "exchanges_counts", lambda config: False)
    monkeypatch.setattr(ascend, "most_tokens", lambda config: 24)
    monkeypatch.setattr(ascend, "_only_decodes", lambda: False)
    with pytest.raises(
        UsageError, match=r"max_tokens is 16 .* and a decode step may have 24 tokens; set it to 24 or more"
    ):
        ascend.fixed_rows(_scheduler(24), True, 16)
    assert ascend.fixed_rows(_scheduler(24), True, None) == 24
    with pytest.raises(
        UsageError, match=r"would send 24 rows, and a step may have 8192 tokens .*recompute_scheduler_ena"
    ):
        ascend.fixed_rows(_scheduler(8192), True, None)
    assert ascend.fixed_rows(_scheduler(8192), True, 8192) == 8192
