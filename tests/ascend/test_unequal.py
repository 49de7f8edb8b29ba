"""The fault that rows of one number cure: vllm-ascend's own split of these layers wants equal numbers of tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ascend import inside
from tests.ascend.inside import Served
from tests.support.distributed import RankFailure, Ranks


def test_its_own_split_breaks_where_ranks_have_different_numbers_of_tokens(
    ranks: Callable[[int], Ranks], dense: Path
) -> None:
    """gloo ends the process that is sent more than it makes room for; what the other does then differs.

    The processes are gone then: whatever uses the group next, starts new ones.
    """
    two = ranks(2)
    served = Served(dense, data=2, mlp=2)
    for results in two.run(inside.forward, served, [[5, 5]]):
        assert len(results[0]) == 3
    with pytest.raises(RankFailure) as failure:
        two.run(inside.forward, served, [[5, 3]])
    assert failure.value.kinds[1] == "EOFError"  # it died
