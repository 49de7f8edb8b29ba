"""The engine's own activation is asked, and must be that of the set; vLLM's MLPs of DeepSeek compute silu."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import Ranks
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import with_activation

LIMIT = 2.0  # of values of about 5
LIMITED = {"name": "silu", "limit": LIMIT}


def _split(model: Path, shards: Path, **more: Any) -> Served:
    return Served(model, shards, data=2, option=2, **more)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_a_set_of_another_activation_stops_all(two: Ranks, dense: Path, tmp_path: Path, name: str, dtype: str) -> None:
    limit = 10.0 if name == "silu" else None
    shards = with_activation(dense.parent / "tp2", tmp_path, {"name": name, "limit": limit})
    for said in two.run(inside.load, _split(dense, shards, dtype=dtype)):
        shown = "silu with limit 10" if limit else name
        assert f"layer 0's activation is {shown}, the engine's SplitMLP computes another: of gate" in said
        assert f"{shown} makes" in said


def test_with_tensor_parallelism_too(pair: Ranks, dense: Path, tmp_path: Path) -> None:
    for said in pair.run(
        inside.load, Served(dense, with_activation(dense.parent / "tp2", tmp_path, LIMITED), tensor=2)
    ):
        assert "layer 0's activation is silu with limit 2, the engine's DeepseekV2MLP computes another" in said


@pytest.mark.parametrize("activation", [None, {"name": "situ", "limit": None}])
def test_what_is_not_known_is_filled_and_not_split(
    two: Ranks, pair: Ranks, dense: Path, tmp_path: Path, activation: dict[str, Any] | None
) -> None:
    shards = with_activation(dense.parent / "tp2", tmp_path, activation)
    assert pair.run(inside.load, Served(dense, shards, tensor=2)) == ["loaded"] * 2
    for said in two.run(inside.load, _split(dense, shards)):
        assert "layer 0: its activation is " in said
        assert "without denseffn_tensor_parallel_size the engine's own partition is filled" in said


def test_an_engine_that_has_the_limit(two: Ranks, dense: Path, tmp_path: Path) -> None:
    """And a set cut from the model that has it: split, the layers compute what the engine computes whole."""
    shards, counts = with_activation(dense.parent / "tp2", tmp_path, LIMITED), [[5, 40], [1, 2]]
    whole = two.run(inside.forward_with, Served(dense, data=2, dtype="bfloat16"), LIMIT, counts)
    ours = two.run(inside.forward_with, _split(dense, shards, dtype="bfloat16"), LIMIT, counts)
    without = two.run(inside.forward, Served(dense, data=2, dtype="bfloat16"), counts)
    for before, after, other in zip(whole, ours, without, strict=True):
        for unsplit, got, unlimited in zip(before, after, other, strict=True):
            for a, b, c in zip(unsplit, got, unlimited, strict=True):
                # BF16: h is rounded, the result, and two partial sums of it.
                assert (a.double() - b.double()).norm() <= 2.0**-7 * a.double().norm()
                assert (a.double() - c.double()).norm() >= 0.1 * a.double().norm()


def test_a_limit_in_the_engine_alone(two: Ranks, pair: Ranks, dense: Path) -> None:
    shards = dense.parent / "tp2"
    for said in two.run(inside.load_with, _split(dense, shards), LIMIT, "activation"):
        assert "layer 0's activation is silu, the engine's SplitMLP computes another: of gate" in said
    for where in ("activation", "forward"):
        for said in pair.run(inside.load_with, Served(dense, shards, tensor=2), LIMIT, where):
            assert "layer 0's activation is silu, the engine's DeepseekV2MLP computes another: of gate" in said
