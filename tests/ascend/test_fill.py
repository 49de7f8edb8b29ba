"""The engine's own layers, filled from shards, are those that its own loader fills."""

from pathlib import Path

import torch

from tests.ascend import inside
from tests.ascend.inside import Served
from tests.distributed import Ranks


def test_bf16(two: Ranks, dense: Path) -> None:
    own = two.run(inside.parameters, Served(dense, data=2, mlp=2))
    ours = two.run(inside.parameters, Served(dense, dense.parent / "tp2", data=2, mlp=2))
    for rank in range(2):
        for before, after in zip(own[rank], ours[rank], strict=True):
            assert before.keys() == after.keys()
            for name, value in before.items():
                assert torch.equal(value, after[name]), name
