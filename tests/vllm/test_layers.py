"""The plugin in vLLM's own workers, without a server: what is built, what is loaded, what a split layer computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.distributed import Ranks
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import HIDDEN, INTERMEDIATE, parts

GetRanks = Callable[[int], Ranks]
Parameters = dict[str, torch.Tensor]


def _split(model: Path, size: int = 2, **more: object) -> Served:
    return Served(model, model.parent / f"tp{size}", data=more.pop("data", size), option=size, **more)  # type: ignore[arg-type]


def _dense(name: str, layers: int) -> bool:
    return any(name.startswith(f"model.layers.{i}.mlp.{p}_proj.") for i in range(layers) for p in ("gate_up", "down"))


def test_only_the_dense_layers_change(two: Ranks, mixed: Path) -> None:
    whole = two.run(inside.parameters, Served(mixed, data=2))
    ours = two.run(inside.parameters, _split(mixed))
    split = {name for name in whole[0] if _dense(name, 2)}
    assert len(split) == 4
    for kind in (".experts.", ".shared_experts.", ".mlp.gate.", ".self_attn.", "lm_head"):
        assert any(kind in name for name in whole[0].keys() - split), kind
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - split:
            assert torch.equal(before[name], after[name]), name
    for name in sorted(split):
        for part, after in zip(parts(name, whole[0][name], 2), ours, strict=True):
            assert torch.equal(part, after[name]), name


@pytest.mark.parametrize("model", ["mixed", "w8a8"])
def test_with_tensor_parallelism_it_fills_what_the_engine_cut(
    pair: Ranks, model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    dtype = "bfloat16" if model == "w8a8" else "float32"
    whole = pair.run(inside.parameters, Served(folder, tensor=2, dtype=dtype))
    ours = pair.run(inside.parameters, Served(folder, folder.parent / "tp2", tensor=2, dtype=dtype))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


def test_w8a8_over_data_parallel_ranks_holds_what_tensor_parallelism_holds(two: Ranks, pair: Ranks, w8a8: Path) -> None:
    whole = pair.run(inside.parameters, Served(w8a8, tensor=2, dtype="bfloat16"))
    ours = two.run(inside.parameters, _split(w8a8, dtype="bfloat16"))
    for before, after in zip(whole, ours, strict=True):
        names = [name for name in before if ".mlp." in name]
        assert names
        assert any(name.endswith("weight_scale") for name in names)
        for name in names:
            assert torch.equal(before[name], after[name]), name


def test_what_a_split_layer_computes(two: Ranks, dense: Path) -> None:
    counts = [[5, 40], [64, 1], [1, 2], [7, 7]]
    whole = two.run(inside.forward, Served(dense, data=2), counts)
    ours = two.run(inside.forward, _split(dense), counts)
    for rank, (before, after) in enumerate(zip(whole, ours, strict=True)):
        for each, unsplit, got in zip(counts, before, after, strict=True):
            for a, b in zip(unsplit, got, strict=True):
                assert b.shape == (each[rank], HIDDEN)
                assert a.abs().max() > 0.5
                # float32 sums of 512 products of size 10, in another order
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


def test_two_groups_of_two(ranks: GetRanks, dense: Path) -> None:
    """Ranks 0 and 1 share the layers, and 2 and 3; each pair has its own token counts."""
    counts = [[5, 40, 1, 3], [2, 2, 9, 1]]
    served = Served(dense, dense.parent / "tp2", data=4, option=2)
    four = ranks(4)
    whole = four.run(inside.forward, Served(dense, data=4), counts)
    ours = four.run(inside.forward, served, counts)
    held = four.run(inside.parameters, served)
    for before, after in zip(whole, ours, strict=True):
        for unsplit, got in zip(before, after, strict=True):
            torch.testing.assert_close(got, unsplit, rtol=1e-5, atol=1e-4)
    name = "model.layers.0.mlp.down_proj.weight"
    assert held[0][name].shape == (HIDDEN, INTERMEDIATE // 2)
    assert torch.equal(held[0][name], held[2][name])
    assert torch.equal(held[1][name], held[3][name])
    assert not torch.equal(held[0][name], held[1][name])


def test_pipeline_stages_split_their_own_layers(ranks: GetRanks, dense: Path, mixed: Path) -> None:
    """Two stages of two data-parallel ranks: ranks 0 and 2 hold the first, 1 and 3 the second."""
    four, counts = ranks(4), [[5, 3, 40, 7], [1, 2, 1, 9]]
    whole = four.run(inside.forward, Served(dense, data=2, pipeline=2), counts)
    ours = four.run(inside.forward, _split(dense, pipeline=2), counts)
    assert sorted(len(layers) for layers in (whole[0][0], whole[1][0])) == [1, 2]
    for before, after in zip(whole, ours, strict=True):
        for unsplit, got in zip(before, after, strict=True):
            torch.testing.assert_close(got, unsplit, rtol=1e-5, atol=1e-4)
    held = four.run(inside.parameters, _split(mixed, pipeline=2))
    name = "model.layers.1.mlp.gate_up_proj.weight"
    assert [name in parameters for parameters in held] == [True, False, True, False]
    assert held[0][name].shape == (INTERMEDIATE, HIDDEN)
    assert not torch.equal(held[0][name], held[2][name])


def test_w8a8_tokens_travel_quantized(two: Ranks, w8a8: Path) -> None:
    found = two.run(inside.w8a8_forward, _split(w8a8, dtype="bfloat16"), [3, 17])
    for each in found:
        assert each["codec"] == "oneDNN int8"
        assert each["ratio"] <= 0.51
        assert each["plain"].abs().max() > 0
        assert torch.equal(each["quantized"], each["plain"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_w8a8_over_data_parallel_ranks_computes_what_tensor_parallelism_computes(
    two: Ranks, pair: Ranks, w8a8: Path, dtype: str
) -> None:
    """The same slices, each with token scales of its own, and two partial sums: the same bits."""
    ours = two.run(inside.forward, _split(w8a8, dtype=dtype), [[5, 5]])
    for rank in (0, 1):
        whole = pair.run(inside.forward_of, Served(w8a8, tensor=2, dtype=dtype), rank, 5)[rank]
        for a, b in zip(whole, ours[rank][0], strict=True):
            assert a.abs().max() > 0
            assert torch.equal(a, b)


def test_a_layer_is_one_operator_to_the_compiler(two: Ranks, dense: Path) -> None:
    for eager, compiled, graphs in two.run(inside.graph_of, _split(dense), [5, 2]):
        assert graphs == 1
        assert torch.equal(eager, compiled)


def test_without_token_counts_every_rank_raises(two: Ranks, dense: Path) -> None:
    for said in two.run(inside.without_counts, _split(dense)):
        assert said.startswith("GroupError: model.layers.0.mlp: the engine gave no token counts")


def test_counts_that_are_not_the_tokens_raise(two: Ranks, dense: Path) -> None:
    for rank, said in enumerate(two.run(inside.with_wrong_counts, _split(dense))):
        assert said == f"TokensError: model.layers.0.mlp, rank {rank}: x has 4 tokens, the engine said 3"


def test_full_weights_are_never_made(two: Ranks, tmp_path: Path) -> None:
    """A full gate would be the largest tensor by far."""
    from reshard.plan.pipeline import Cut
    from tests.support.running import split
    from tests.vllm.models import write_model

    model = write_model(tmp_path / "model", layers=1, dense=1, intermediate=16384)
    split(model, tmp_path / "tp2", Cut(2))
    full = 16384 * HIDDEN
    assert min(two.run(inside.largest_tensor, Served(model, data=2))) == 2 * full  # gate and up, stacked
    assert max(two.run(inside.largest_tensor, _split(model))) == full  # half of each, stacked


def test_a_size_of_one_splits_nothing(two: Ranks, dense: Path, tmp_path: Path) -> None:
    from reshard.plan.pipeline import Cut
    from tests.support.running import split

    split(dense, tmp_path / "tp1", Cut(1))
    whole = two.run(inside.parameters, Served(dense, data=2))
    ours = two.run(inside.parameters, Served(dense, tmp_path / "tp1", data=2, option=1))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_another_dtype_casts_unquantized_weights(two: Ranks, dense: Path) -> None:
    exact = two.run(inside.parameters, _split(dense))
    cast = two.run(inside.parameters, _split(dense, dtype="bfloat16"))
    for before, after in zip(exact, cast, strict=True):
        name = "model.layers.1.mlp.gate_up_proj.weight"
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].bfloat16(), after[name])


def test_weights_are_not_loaded_again(two: Ranks, dense: Path) -> None:
    """The engine would cut what it loads to the first rank's part, on every rank."""
    for from_disk, sent, same in two.run(inside.loaded_again, _split(dense)):
        assert from_disk.startswith("UsageError: denseffn_shards fills a model once")
        assert same
        assert sent.startswith("UsageError: a dense layer's weight [512, 256] was sent to a rank that holds a part")


def test_a_draft_model_is_left_alone(two: Ranks, dense: Path) -> None:
    whole = two.run(inside.parameters, Served(dense, data=2))
    ours = two.run(inside.draft, _split(dense))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
