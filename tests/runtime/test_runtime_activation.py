"""The activation from config.json to the split layer: what it computes is what transformers' own MLP does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reshard.errors import GroupError, ShardError
from reshard.model.activation import SILU, Activation
from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, load_shard
from tests.support.activations import CASES, Case, checkpoint_of
from tests.support.distributed import RankFailure, Ranks
from tests.support.running import split
from tests.support.unsplit import error

HIDDEN, INTERMEDIATE, TOKENS = 256, 512, 32
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _shards(folder: Path, mlp: Any, config: dict[str, Any] | None, size: int, weights: Any = "keep") -> Path:
    split(checkpoint_of(mlp, folder / "model", config), folder / "shards", Cut(size, weights=weights))
    return folder / "shards"


def _tokens() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def _own(group: dist.ProcessGroup, shards: Path, dtype: torch.dtype) -> torch.Tensor:
    ffn = DenseFFN(load_shard(shards, group.rank()).layer(0), group)
    return ffn(_tokens().chunk(group.size())[group.rank()].to(dtype))


@by_case
@pytest.mark.parametrize("size", [2, 4])
def test_the_split_layer_is_transformers_mlp(
    ranks: Callable[[int], Ranks], tmp_path: Path, case: Case, size: int
) -> None:
    mlp = case.mlp(HIDDEN, INTERMEDIATE)
    shards = _shards(tmp_path, mlp, case.config, size)
    found = torch.cat(ranks(size).run(_own, shards, torch.float32))
    reference = mlp.double()(_tokens().double())
    assert load_shard(shards, 0).layer(0).activation == case.activation
    # A float32 sum of 512 terms in another order: sqrt(512) roundings of 2^-24 are 1.3e-6.
    assert error(found, reference) <= 3e-6


@by_case
def test_in_bf16_it_is_as_exact_as_transformers(tmp_path: Path, case: Case) -> None:
    mlp = case.mlp(HIDDEN, INTERMEDIATE).bfloat16()
    ffn = DenseFFN(load_shard(_shards(tmp_path, mlp, case.config, 1), 0).layer(0))
    x_TH = _tokens().bfloat16()
    own = mlp(x_TH)
    reference = mlp.double()(x_TH.double())
    assert error(ffn(x_TH), reference) <= 1.5 * error(own, reference)


@by_case
def test_w8a8_is_off_by_its_steps_only(ranks: Callable[[int], Ranks], tmp_path: Path, case: Case) -> None:
    mlp = case.mlp(HIDDEN, INTERMEDIATE).bfloat16()
    shards = _shards(tmp_path, mlp, case.config, 2, weights="w8a8")
    found = torch.cat(ranks(2).run(_own, shards, torch.bfloat16))
    reference = mlp.double()(_tokens().double())
    assert error(found, reference) <= 0.03  # steps of max/127 of weights, tokens and h, as in test_runtime_transformers


def test_one_activation_is_no_other(tmp_path: Path) -> None:
    """The bounds above are no bounds if it is: of every pair but the two gelus the results differ by a percent."""
    outputs = {}
    for name, case in CASES.items():
        mlp = case.mlp(HIDDEN, INTERMEDIATE)
        layer = load_shard(_shards(tmp_path / name, mlp, case.config, 1), 0).layer(0)
        outputs[name] = DenseFFN(layer)(_tokens()).double()
    names = list(outputs)
    for at, one in enumerate(names):
        for other in names[at + 1 :]:
            both_gelu = one.replace("_pytorch_tanh", "") == other.replace("_pytorch_tanh", "")
            assert error(outputs[one], outputs[other]) > (1e-4 if both_gelu else 0.01), (one, other)


def _made(group: dist.ProcessGroup, shards: Path) -> str:
    DenseFFN(load_shard(shards, group.rank()).layer(0), group)
    return "made"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_act": "relu2"}, "layer 0: its activation is relu2, whose formula is not known here"),
        (None, "layer 0: its activation is not known: no config.json stood beside the weights"),
    ],
)
def test_what_is_not_known_is_cut_and_not_computed(
    ranks: Callable[[int], Ranks], tmp_path: Path, config: dict[str, Any] | None, said: str
) -> None:
    mlp = CASES["silu"].mlp(HIDDEN, INTERMEDIATE)
    shards = _shards(tmp_path, mlp, config, 2)
    parts = [load_shard(shards, rank).layer(0) for rank in range(2)]
    assert torch.equal(torch.cat([part.down.tensors["weight"] for part in parts], dim=1), mlp.down_proj.weight)
    with pytest.raises(RankFailure, match=said) as raised:
        ranks(2).run(_made, shards)
    assert set(raised.value.kinds.values()) <= {ShardError.__name__, GroupError.__name__}


def test_the_layer_says_what_it_computes(tmp_path: Path) -> None:
    case = CASES["silu with a limit"]
    shards = _shards(tmp_path, case.mlp(HIDDEN, INTERMEDIATE), case.config, 1)
    ffn = DenseFFN(load_shard(shards, 0).layer(0))
    assert ffn.activation == Activation(SILU, 0.5)
    assert "silu with limit 0.5" in repr(ffn)
