"""How tokens travel to vllm-ascend's linears: quantized by its own operators, and its own result all the same."""

from collections.abc import Callable

import pytest
import torch

from tests.ascend import inside, steps
from tests.ascend.inside import DECODE_NODE
from tests.ascend.models import Model
from tests.support.distributed import Ranks

OPTION = {"data": 2, "option": 2}
COUNTS = [3, 17]
DYNAMIC, STATIC, PLAIN = "Ascend dynamic", "Ascend static", "passthrough"


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("tiny-bf16", PLAIN),
        ("msmodelslim-w8a8_dynamic_sharded", DYNAMIC),
        ("msmodelslim_v0-w8a8_mla_static_mlp_dynamic", DYNAMIC),
        ("llmcompressor-w8a8", DYNAMIC),
        ("dynamic, down plain", DYNAMIC),
        ("mix", DYNAMIC),
        ("msmodelslim_v0-w8a8_static", STATIC),
        ("static v1", STATIC),
    ],
)
def test_the_bytes_of_a_token_and_the_bits_of_the_result(
    two: Ranks, model: Callable[[str], Model], name: str, way: str
) -> None:
    _, ours = model(name).both(**OPTION)
    found = two.run(steps.travel, ours, COUNTS)
    for rank, each in enumerate(found):
        hidden = each["hidden"]
        row = {DYNAMIC: hidden + 4, STATIC: hidden, PLAIN: 2 * hidden}[way]
        assert len(each["layers"]) >= 2
        for layer in each["layers"]:
            assert (layer["way"], layer["row"]) == (way, row)
            assert layer["result"].shape == (COUNTS[rank], hidden)
            assert layer["result"].abs().max() > 0
            assert torch.equal(layer["result"], layer["as they are"])
        if way != PLAIN:
            assert row <= 0.51 * 2 * hidden


def test_in_a_decode_node_mixed_weights_are_static(four: Ranks, model: Callable[[str], Model]) -> None:
    """vllm-ascend's own choice. The rows are of the node's fixed number, in both directions."""
    _, ours = model("mix").both(data=4, option=2, engine=DECODE_NODE)
    for each in four.run(steps.travel, ours, [3, 3, 17, 1]):
        for layer in each["layers"]:
            assert (layer["way"], layer["row"]) == (STATIC, each["hidden"])
            assert torch.equal(layer["result"], layer["as they are"])


@pytest.mark.parametrize("name", ["msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_static"])
def test_a_split_layer_computes_what_vllm_ascends_own_split_does(
    two: Ranks, model: Callable[[str], Model], name: str
) -> None:
    """Equal counts, which its own wants; its partial sums are added in BF16 by gloo, ours in float32."""
    made, counts = model(name), [[5, 5], [1, 1]]
    own, _ = made.both(data=2, mlp=2)
    _, ours = made.both(**OPTION)
    for theirs, filled in zip(two.run(inside.forward, own, counts), two.run(inside.forward, ours, counts), strict=True):
        for own_layers, our_layers in zip(theirs, filled, strict=True):
            for own_result, our_result in zip(own_layers, our_layers, strict=True):
                assert own_result.abs().max() > 0
                torch.testing.assert_close(our_result, own_result, rtol=2**-7, atol=1e-3)
