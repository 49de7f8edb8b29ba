"""The split layer on real gloo processes: what comes out, and what travels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reshard.prepare import Cut
from runtime import DenseFFN, load_shard
from tests.builders import Spec, build
from tests.distributed import Ranks
from tests.running import split

HIDDEN, INTERMEDIATE = 256, 1024


def _tokens(count: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _outputs(group: dist.ProcessGroup, shards: Path, counts: list[int]) -> torch.Tensor:
    layer = load_shard(shards, group.rank()).layer(0)
    ffn = DenseFFN(layer, group)
    return ffn(_tokens(counts[group.rank()], group.rank()), tokens_per_rank=counts)


@pytest.mark.parametrize("size", [2, 4])
def test_split_equals_whole(ranks: Callable[[int], Ranks], tmp_path: Path, size: int) -> None:
    build(tmp_path / "model", Spec("bf16", HIDDEN, INTERMEDIATE, computable=True))
    split(tmp_path / "model", tmp_path / "whole", Cut(1))
    split(tmp_path / "model", tmp_path / "split", Cut(size))
    counts = [5, 1, 0, 7][:size]
    outputs = ranks(size).run(_outputs, tmp_path / "split", counts)
    whole = DenseFFN(load_shard(tmp_path / "whole", 0).layer(0))
    for rank, count in enumerate(counts):
        torch.testing.assert_close(outputs[rank], whole(_tokens(count, rank)), atol=0.05, rtol=0.02)
