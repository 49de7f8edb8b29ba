"""denseffn_tensor_parallel_size under the real vllm-ascend, on its linears and in its forward context."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ascend import inside, steps
from tests.ascend.inside import Served
from tests.ascend.models import close
from tests.support.distributed import Ranks
from tests.vllm.models import HIDDEN

COUNTS = [[5, 5], [5, 3], [1, 64], [0, 2]]
RANK_1 = "denseffn-rank-00001-of-00002.safetensors"


def _split(model: Path, size: int = 2, **more: object) -> Served:
    return Served(model, model.parent / f"tp{size}", data=more.pop("data", size), option=size, **more)  # type: ignore[arg-type]


def _is_dense(name: str) -> bool:
    return any(f"model.layers.{layer}.mlp.{part}_proj" in name for layer in (0, 1) for part in ("gate_up", "down"))


def test_only_the_dense_layers_change(two: Ranks, mixed: Path) -> None:
    """Every other module keeps its class, its tensors, its size and the way in which vllm-ascend runs it."""
    whole, ours = Served(mixed, data=2), _split(mixed)
    for before, after in zip(two.run(inside.classes, whole), two.run(inside.classes, ours), strict=True):
        assert {name: (kind, after[name]) for name, kind in before.items() if after[name] != kind} == {
            f"model.layers.{layer}.mlp": (
                "vllm.model_executor.models.deepseek_v2.DeepseekV2MLP",
                "reshard_runtime.serving.vllm.split_mlp.SplitMLP",
            )
            for layer in (0, 1)
        }
        assert before["model.layers.0.mlp.down_proj"].startswith("vllm_ascend.ops.linear.AscendRow")
        assert before.keys() == after.keys()
    both = zip(two.run(inside.parameters, whole), two.run(inside.parameters, ours), strict=True)
    for rank, ((before, _), (after, _)) in enumerate(both):
        assert before.keys() == after.keys()
        changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert {name for name in changed if not _is_dense(name)} == set()
        for layer in (0, 1):
            down = f"model.layers.{layer}.mlp.down_proj.weight"
            assert torch.equal(after[down], before[down].chunk(2, dim=1)[rank])
        for kind in (".experts.", ".shared_experts.", ".mlp.gate.", ".self_attn.", "lm_head"):
            assert any(kind in name for name in before), kind
    for before, after in zip(two.run(steps.sizes, whole), two.run(steps.sizes, ours), strict=True):
        assert before == after
        assert after["mlp group"] is None


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_split_layer_computes(two: Ranks, four: Ranks, dense: Path, size: int) -> None:
    """Four ranks: 0 and 1 share the layers, and 2 and 3."""
    group, counts = (two, COUNTS) if size == 2 else (four, [[*each, *reversed(each)] for each in COUNTS])
    whole = group.run(inside.forward, Served(dense, data=size), counts)
    ours = group.run(inside.forward, _split(dense, data=size), counts)
    for rank, (before, after) in enumerate(zip(whole, ours, strict=True)):
        for each, unsplit, got in zip(counts, before, after, strict=True):
            assert len(got) == 3
            for a, b in zip(unsplit, got, strict=True):
                assert b.shape == (each[rank], HIDDEN)
                close(b, a)


def test_data_and_tensor_parallel_ranks_together(four: Ranks, dense: Path) -> None:
    served = Served(dense, dense.parent / "tp4", data=2, tensor=2, option=4)
    whole = four.run(inside.forward, Served(dense, data=2, tensor=2), COUNTS)
    ours = four.run(inside.forward, served, COUNTS)
    for before, after in zip(whole, ours, strict=True):
        for unsplit, got in zip(before, after, strict=True):
            for a, b in zip(unsplit, got, strict=True):
                close(b, a)
    for pair in (0, 2):  # tensor-parallel ranks go on with the same hidden states
        assert all(torch.equal(a, b) for a, b in zip(ours[pair][0], ours[pair + 1][0], strict=True))


def test_a_draft_model_is_left_alone(two: Ranks, dense: Path) -> None:
    whole = two.run(inside.parameters, Served(dense, data=2))
    ours = two.run(inside.parameters, _split(dense, draft=True))
    for (before, _), (after, _) in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def _fails(group: Ranks, served: Served, *wanted: str) -> None:
    for said in group.run(inside.load, served):
        for text in wanted:
            assert text in said


@pytest.mark.parametrize("own_split", [False, True])
def test_one_ranks_bad_shard_stops_all(two: Ranks, dense: Path, tmp_path: Path, own_split: bool) -> None:
    """With one message, whichever way the layers are split."""
    how: dict[str, Any] = {"mlp": 2} if own_split else {"option": 2}
    good, bad = dense.parent / "tp2" / RANK_1, tmp_path / "tp2" / RANK_1
    shutil.copytree(good.parent, bad.parent)
    bad.write_bytes(good.read_bytes()[:-100])
    _fails(two, Served(dense, bad.parent, data=2, **how), RANK_1, "bytes, manifest.json says")
    shutil.copy(good.with_name(RANK_1.replace("00001", "00000", 1)), bad)
    _fails(two, Served(dense, bad.parent, data=2, **how), RANK_1, "tp_rank '0', manifest.json says '1'")
    bad.unlink()
    _fails(two, Served(dense, bad.parent, data=2, **how), RANK_1, "No such file")


def test_a_set_of_another_model_stops_all(two: Ranks, dense: Path, mixed: Path) -> None:
    served = Served(dense, mixed.parent / "tp2", data=2, option=2)
    _fails(two, served, "its dense layers are 0, 1, the served model's 0, 1, 2")


def test_what_does_not_go_together(two: Ranks, four: Ranks, dense: Path) -> None:
    shards = dense.parent / "tp2"
    _fails(two, Served(dense, shards, data=2, option=2, mlp=2), "both cut the same layers; leave one of the two out")
    _fails(two, Served(dense, shards, data=2, option=2, extra={"max_tokens": 8}), "max_tokens is 8 in model_loader")
    _fails(
        four,
        Served(dense, shards, data=2, pipeline=2, mlp=2),
        "finegrained_tp_config.mlp_tensor_parallel_size is 2, pipeline-parallel size 2",
    )
    flashcomm = Served(
        dense,
        dense.parent / "tp4",
        data=2,
        tensor=2,
        option=4,
        environment={"VLLM_ASCEND_ENABLE_FLASHCOMM1": "1"},
        engine={"enable_expert_parallel": True},
    )
    _fails(four, flashcomm, "vllm-ascend runs it by Sequence", "enable_flashcomm1")
