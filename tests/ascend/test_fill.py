"""vllm-ascend's own partitioned layers, filled from shards: the same bytes and the same results as by its own loader.

The model that the shards go with is poisoned: whatever of its dense layers were read would show.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ascend import inside
from tests.ascend.inside import DECODE_NODE
from tests.ascend.models import MADE, Model, same
from tests.support.distributed import Ranks
from tests.vllm.models import with_activation

MLP, TENSOR = {"data": 2, "mlp": 2}, {"tensor": 2}
REAL = (
    "tiny-bf16",
    "msmodelslim-w8a8_dynamic_sharded",
    "msmodelslim_v0-w8a8_mla_static_mlp_dynamic",
    "msmodelslim_v0-w8a8_static",
    "llmcompressor-w8a8",
    "llmcompressor-w8a8-all-dense",
)
# What vllm-ascend does not load on an Atlas A2, with what it says.
NOT_LOADED = {
    "fp8_block": "fp8 quantization is currently not supported in npu|object has no attribute 'o_groups'",
    "llmcompressor-fp8_block": "No compressed-tensors compatible quantization type was found",
    "ct_static_asymmetric": "No compressed-tensors compatible quantization type was found",
    "int8_block": "Unknown quantization method: blockwise_int8",
}


def _loaded(ranks: Ranks, made: Model, **layout: Any) -> None:
    own, ours = made.both(**layout)
    loaded = zip(ranks.run(inside.parameters, own), ranks.run(inside.parameters, ours), strict=True)
    for theirs, filled in loaded:
        for own_tensors, our_tensors in zip(theirs, filled, strict=True):
            same(own_tensors, our_tensors)


def _compare(ranks: Ranks, made: Model, counts: list[list[int]], **layout: Any) -> None:
    _loaded(ranks, made, **layout)
    own, ours = made.both(**layout)
    computed = zip(ranks.run(inside.forward, own, counts), ranks.run(inside.forward, ours, counts), strict=True)
    for theirs, filled in computed:
        for own_layers, our_layers in zip(theirs, filled, strict=True):
            assert len(own_layers) >= 2
            for own_result, our_result in zip(own_layers, our_layers, strict=True):
                assert own_result.abs().max() > 0
                assert torch.equal(own_result, our_result)


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_the_layers_of_an_mlp_group(two: Ranks, model: Callable[[str], Model], name: str) -> None:
    _compare(two, model(name), [[5, 5], [1, 1]], **MLP)


@pytest.mark.parametrize("name", [*REAL, *MADE])
def test_the_layers_of_tensor_parallelism(two: Ranks, model: Callable[[str], Model], name: str) -> None:
    _compare(two, model(name), [[5], [1]], **TENSOR)


def test_mix_in_a_decode_node(two: Ranks, model: Callable[[str], Model]) -> None:
    """There its layers quantize tokens by one scale, elsewhere each by its own."""
    _compare(two, model("mix"), [[5, 5], [1, 1]], **MLP, engine=DECODE_NODE)


@pytest.mark.parametrize("name", ["tiny-bf16", "msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_static"])
def test_two_mlp_groups_in_a_data_parallel_size_of_four(four: Ranks, model: Callable[[str], Model], name: str) -> None:
    _compare(four, model(name), [[5, 5, 3, 3], [1, 1, 7, 7]], data=4, mlp=2)


def test_what_is_filled_is_vllm_ascends(two: Ranks, model: Callable[[str], Model]) -> None:
    for served in model("tiny-bf16").both(**MLP):
        for rank, linears in enumerate(two.run(inside.dense_linears, served)):
            assert linears == {
                ("AscendMergedColumnParallelLinear", "MLPColumnParallelOp", rank, 2),
                ("AscendRowParallelLinear", "MLPRowParallelOp", rank, 2),
            }


def test_a_set_of_another_activation(two: Ranks, model: Callable[[str], Model], tmp_path: Path) -> None:
    """vllm-ascend's own kernel for silu is asked, on the linears of its MLP group and split over the ranks."""
    made = model("tiny-bf16")
    shards = with_activation(made.shards, tmp_path, {"name": "silu", "limit": 10.0})
    filled = dataclasses.replace(made.both(**MLP)[1], shards=shards)
    for served, kind in (
        (filled, "DeepseekV2MLP"),
        (dataclasses.replace(filled, mlp=None, option=2), "SplitMLP"),
    ):
        for said in two.run(inside.load, served):
            assert f"layer 0's activation is silu with limit 10, the engine's {kind} computes another: of gate" in said


def test_fp8_with_a_scale_for_each_channel(two: Ranks, model: Callable[[str], Model]) -> None:
    """Its kernels are a later Atlas's, and there is no stand-in for them: it is filled only.

    0.18.0 takes such weights for int8 and loads them so, which we do not.
    """
    made = model("ct_fp8_channel")
    own, ours = made.both(**MLP)
    (before, _), _ = two.run(inside.parameters, own)
    if before["model.layers.0.mlp.gate_up_proj.weight"].dtype == torch.float8_e4m3fn:
        _loaded(two, made, **MLP)
    else:
        for said in two.run(inside.load, ours):
            assert "weight is torch.float8_e4m3fn, the engine's parameter torch.int8" in said


def test_compressed_tensors_with_one_scale_for_all_tokens(two: Ranks, model: Callable[[str], Model]) -> None:
    """vllm-ascend loads it, and leaves the input's offset as the memory was; filling such a layer is refused."""
    own, ours = model("ct_static").both(**MLP)
    name = "model.layers.0.mlp.gate_up_proj.input_offset"
    for before, _ in two.run(inside.parameters, own):
        assert before[name].tolist() == [127]  # what memory that nobody fills holds here
    for said in two.run(inside.load, ours):
        assert "the engine's layer has deq_scale, input_offset, input_scale" in said
        assert "the shard (w8a8_static) input_scale, weight, weight_scale" in said


@pytest.mark.parametrize("name", NOT_LOADED)
def test_what_vllm_ascend_does_not_load(two: Ranks, model: Callable[[str], Model], name: str) -> None:
    """Neither by its own loader nor by ours, which leaves the building of layers to it."""
    for served in model(name).both(**MLP):
        for said in two.run(inside.load, served):
            assert re.search(NOT_LOADED[name], said)
