"""What a cut is refused for, the sizes that are offered instead, and DeepSeek-R1's own numbers."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.checkpoint.config_only import config_checkpoint
from reshard.checkpoint.description import Checkpoint
from reshard.errors import AlignmentError
from reshard.plan.plan import Plan, make_plan, required_multiple, working_sizes
from tests.plan.shapes import checkpoint_of, grid_of, share_of
from tests.support.builders import Spec
from tests.support.cut_by_hand import BLOCK
from tests.support.paths import CONFIGS


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["bf16", "fp8_block", "modelslim_v0_static", "int8_block"]),
    st.integers(1, 200) | st.integers(1, 30).map(lambda blocks: blocks * BLOCK),
    st.integers(2, 40),
)
def test_listed_sizes_work_and_no_others(recipe: str, intermediate: int, tp: int) -> None:
    spec = Spec(recipe, hidden=8, intermediate=intermediate, dense=1)
    checkpoint = checkpoint_of(spec)
    if tp > intermediate or share_of(spec, tp, "fused", False) is not None:
        return
    with pytest.raises(AlignmentError) as caught:
        make_plan(checkpoint, tp)
    message = str(caught.value)
    assert message.startswith(f"model.layers.0.mlp.gate_proj.weight: dim 0 = {intermediate} ")
    assert f"tp {tp}" in message
    assert "--pad" in message
    assert ("--weights bf16" in message) == (grid_of(spec) == BLOCK and intermediate % tp == 0)
    match = re.search(r"use a tp of ([0-9, ]+?)(, …)?;", message)
    listed = [int(size) for size in match[1].split(",")] if match else []
    limit = max(listed, default=0) if match and match[2] else intermediate
    working = [size for size in range(1, limit + 1) if share_of(spec, size, "fused", False) is not None]
    assert listed == working
    for size in listed:
        make_plan(checkpoint, size)


@pytest.mark.parametrize(
    ("tp", "message"), [(0, "tp 0: "), (-2, "tp -2: "), (13, "tp 13 is greater than intermediate_size 12")]
)
@pytest.mark.parametrize("pad", [False, True])
def test_group_sizes_out_of_range(tp: int, message: str, pad: bool) -> None:
    with pytest.raises(AlignmentError, match=f"^{re.escape(message)}"):
        make_plan(checkpoint_of(Spec("bf16", hidden=4, intermediate=12)), tp, "fused", pad)


def test_blocks_of_two_sizes_are_both_kept_whole() -> None:
    """A share of whole 48-column blocks of down that cuts gate's 32-row blocks in two would take the wrong scales."""
    config = json.loads((CONFIGS / "deepseek-r1.json").read_text()) | {"intermediate_size": 960, "hidden_size": 96}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    for name, roles, block in (("a", "gate|up", [32, 32]), ("b", "down", [48, 48])):
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        config["quantization_config"]["config_groups"][name] = {
            "targets": [rf"re:.*mlp\.({roles})_proj$"],
            "weights": {**common, "strategy": "block", "block_structure": block},
            "input_activations": {**common, "strategy": "group", "dynamic": True},
        }
    checkpoint = config_checkpoint(config, "model")
    assert required_multiple(checkpoint.layers) == 96
    with pytest.raises(
        AlignmentError, match=r"gives 240 rows, not a multiple of the 96-row .*; use a tp of 1, 2, 5, 10;"
    ):
        make_plan(checkpoint, 4)


def test_a_block_along_in_is_told_in_columns() -> None:
    """MXFP8's groups of 32 lie along down's inputs, which is what is cut; gate's lie along hidden_size."""
    checkpoint = checkpoint_of(Spec("modelslim_mxfp8", hidden=32, intermediate=96))
    with pytest.raises(
        AlignmentError,
        match=r"^model\.layers\.0\.mlp\.down_proj\.weight: dim 1 = 96 over tp 2 gives 48 columns, not a multiple "
        r"of the 32-column scale block; use a tp of 1, 3; or --pad to add zero columns, or --weights bf16$",
    ):
        make_plan(checkpoint, 2)


def test_some_ranks_of_a_plan_are_those_of_the_whole() -> None:
    checkpoint = checkpoint_of(Spec("fp8_block", hidden=BLOCK, intermediate=8 * BLOCK))
    assert make_plan(checkpoint, 8, tp_ranks=(3, 0)).shards == tuple(make_plan(checkpoint, 8).shards[r] for r in (3, 0))


def test_no_size_is_offered_that_no_shard_file_has_digits_for() -> None:
    assert working_sizes(2**31, 1) == [2**power for power in range(17)]


# --- DeepSeek-R1's own numbers ---


def r1(recipe: str) -> Checkpoint:
    return checkpoint_of(Spec(recipe, hidden=7168, intermediate=18432, dense=3))


def local_shapes(plan: Plan, rank: int) -> dict[str, tuple[int, ...]]:
    prefix = "model.layers.2.mlp."
    shard = plan.shards[rank]
    return {t.name.removeprefix(prefix): t.shape for t in shard.tensors if t.name.startswith(prefix)}


def test_r1_in_bf16() -> None:
    plan = make_plan(r1("bf16"), 8)
    for rank in range(8):
        assert local_shapes(plan, rank) == {"gate_up_proj.weight": (4608, 7168), "down_proj.weight": (7168, 2304)}
        assert plan.shards[rank].size == 4096 + 3 * 792_723_456 // 8


def test_r1_in_static_w8a8() -> None:
    assert local_shapes(make_plan(r1("modelslim_v0_static"), 16), 15) == {
        "gate_up_proj.weight": (2304, 7168),
        "gate_up_proj.weight_scale": (2304, 1),
        "gate_up_proj.weight_offset": (2304, 1),
        "gate_up_proj.quant_bias": (2304,),
        "gate_up_proj.deq_scale": (2304,),
        "gate_up_proj.input_scale": (1,),
        "gate_up_proj.input_offset": (1,),
        "down_proj.weight": (7168, 1152),
        "down_proj.weight_scale": (7168, 1),
        "down_proj.weight_offset": (7168, 1),
        "down_proj.quant_bias": (7168,),
        "down_proj.deq_scale": (7168,),
        "down_proj.input_scale": (1,),
        "down_proj.input_offset": (1,),
    }


def test_r1_in_fp8_blocks() -> None:
    assert local_shapes(make_plan(r1("fp8_block"), 16), 3) == {
        "gate_up_proj.weight": (2304, 7168),
        "gate_up_proj.weight_scale_inv": (18, 56),
        "down_proj.weight": (7168, 1152),
        "down_proj.weight_scale_inv": (56, 9),
    }


def test_r1_in_fp8_blocks_over_32_is_off_the_grid() -> None:
    with pytest.raises(AlignmentError) as caught:
        make_plan(r1("fp8_block"), 32)
    assert str(caught.value) == (
        "model.layers.0.mlp.gate_proj.weight: dim 0 = 18432 over tp 32 gives 576 rows, not a multiple of the 128-row "
        "scale block; use a tp of 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 36, …; or --pad to add zero rows, or "
        "--weights bf16"
    )
    padded = make_plan(r1("fp8_block"), 32, pad=True)
    assert padded.padding is not None
    assert (padded.padding.padded, padded.padding.multiple) == (20480, 128)
    assert (
        local_shapes(padded, 31)
        == local_shapes(padded, 0)
        == {
            "gate_up_proj.weight": (1280, 7168),
            "gate_up_proj.weight_scale_inv": (10, 56),
            "down_proj.weight": (7168, 640),
            "down_proj.weight_scale_inv": (56, 5),
        }
    )
    make_plan(r1("bf16"), 32)
