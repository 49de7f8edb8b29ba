"""The vLLM hook's filling of an engine's parameters, with linears that stand in for the engine's."""

from typing import Any

import pytest
import torch
from torch import nn

from reshard.errors import ShardError
from reshard_runtime.serving.vllm.copy_params import fill
from reshard_runtime.shard import LinearShard


class Linear(nn.Module):
    """An engine's linear with parameters of given types and shapes, all 9 to begin with."""

    def __init__(self, parts: int = 1, **parameters: tuple[torch.dtype, tuple[int, ...]]) -> None:
        super().__init__()
        self.output_sizes = [1] * parts
        for name, (dtype, shape) in parameters.items():
            value = torch.full(shape, 9, dtype=dtype)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _shard(scheme: str = "w8a8_dynamic", **tensors: torch.Tensor) -> LinearShard:
    return LinearShard("model.layers.0.mlp.down_proj", scheme, None, tensors)


_WEIGHT = torch.arange(12, dtype=torch.int8).reshape(4, 3)
_INT8: dict[str, Any] = {"weight": (torch.int8, (4, 3))}


def test_fill_copies_every_tensor() -> None:
    scale = torch.rand(4, 1)
    linear = Linear(**_INT8, weight_scale=(torch.float32, (4, 1)))
    assert fill(linear, _shard(weight=_WEIGHT, weight_scale=scale)) == set()
    assert torch.equal(linear.weight, _WEIGHT)
    assert torch.equal(linear.weight_scale, scale)


def test_fill_takes_a_scale_in_one_dimension() -> None:
    scale = torch.rand(4)
    linear = Linear(**_INT8, weight_scale=(torch.float32, (4, 1)))
    fill(linear, _shard(weight=_WEIGHT, weight_scale=scale))
    assert torch.equal(linear.weight_scale[:, 0], scale)


def test_fill_gives_each_part_of_a_stacked_linear_the_one_scale() -> None:
    linear = Linear(2, **_INT8, input_scale=(torch.float32, (2,)))
    fill(linear, _shard(weight=_WEIGHT, input_scale=torch.tensor([0.5])))
    assert linear.input_scale.tolist() == [0.5, 0.5]


def test_fill_widens_scales_exactly() -> None:
    scale = torch.rand(4, 1).bfloat16()
    linear = Linear(**_INT8, weight_scale=(torch.float32, (4, 1)))
    assert fill(linear, _shard(weight=_WEIGHT, weight_scale=scale)) == {"torch.bfloat16 to torch.float32"}
    assert torch.equal(linear.weight_scale, scale.float())


def test_fill_rounds_scales_to_the_engines_type() -> None:
    linear = Linear(**_INT8, weight_scale=(torch.bfloat16, (4, 1)))
    assert fill(linear, _shard(weight=_WEIGHT, weight_scale=_SCALE)) == {"torch.float32 to torch.bfloat16"}
    assert torch.equal(linear.weight_scale, _SCALE.bfloat16())


def test_fill_casts_weights_that_are_not_quantized() -> None:
    weight = torch.rand(4, 3)
    linear = Linear(weight=(torch.bfloat16, (4, 3)))
    assert fill(linear, _shard("bf16", weight=weight)) == {"torch.float32 to torch.bfloat16"}
    assert torch.equal(linear.weight, weight.bfloat16())


class Computes:
    """vllm-ascend's `get_computed_params`."""

    def get_computed_params(self) -> set[str]:
        return {"weight_offset", "quant_bias", "deq_scale", "weight_scale"}


def test_fill_leaves_what_the_engine_computes() -> None:
    """llm-compressor writes no offsets; a scale must be there all the same."""
    linear = Linear(**_INT8, weight_scale=(torch.float32, (4, 1)), weight_offset=(torch.float32, (4, 1)))
    linear.quant_method = Computes()
    fill(linear, _shard(weight=_WEIGHT, weight_scale=_SCALE))
    assert torch.equal(linear.weight_scale, _SCALE)
    assert torch.equal(linear.weight_offset, torch.full((4, 1), 9.0))
    with pytest.raises(ShardError, match="the engine's layer has weight, weight_offset, weight_scale, the shard"):
        fill(linear, _shard(weight=_WEIGHT))


def test_fill_takes_static_linears_without_weight_scales() -> None:
    """ModelSlim v1 writes five tensors for them: deq_scale holds the scale."""
    linear = Linear(
        **_INT8,
        weight_scale=(torch.bfloat16, (4, 1)),
        weight_offset=(torch.bfloat16, (4, 1)),
        input_scale=(torch.bfloat16, (1,)),
        input_offset=(torch.int8, (1,)),
        quant_bias=(torch.int32, (4,)),
        deq_scale=(torch.float32, (4,)),
    )
    static = {name: value.detach().clone() for name, value in linear.named_parameters() if "weight_" not in name}
    linear.quant_method = Computes()
    fill(linear, _shard("w8a8_static", **static | {"deq_scale": torch.rand(4)}))
    assert linear.deq_scale.max() < 1


_SCALE = torch.full((4, 1), 0.1)
_FP8 = torch.ones(4, 3).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("linear", "shard", "said"),
    [
        (
            Linear(**_INT8),
            _shard(weight=_WEIGHT, weight_scale=_SCALE),
            "the engine's layer has weight, the shard (w8a8_dynamic) weight, weight_scale",
        ),
        (
            Linear(**_INT8, weight_scale=(torch.float32, (4, 1))),
            _shard(weight=_WEIGHT),
            "the engine's layer has weight, weight_scale, the shard (w8a8_dynamic) weight;",
        ),
        (
            Linear(weight=(torch.int8, (8, 3))),
            _shard(weight=_WEIGHT),
            "weight is [4, 3], the engine's parameter [8, 3]",
        ),
        (
            Linear(weight=(torch.int8, (3, 4))),
            _shard(weight=_WEIGHT),
            "weight is [4, 3], the engine's parameter [3, 4]",
        ),
        (
            Linear(weight=(torch.float32, (4, 3))),
            _shard(weight=_WEIGHT),
            "weight is torch.int8, the engine's parameter torch.float32",
        ),
        (
            Linear(weight=(torch.bfloat16, (4, 3))),
            _shard("fp8_block", weight=_FP8),
            "weight is torch.float8_e4m3fn, the engine's parameter torch.bfloat16",
        ),
        (
            Linear(**_INT8, input_offset=(torch.int8, (1,))),
            _shard(weight=_WEIGHT, input_offset=torch.tensor([0.5])),
            "input_offset is torch.float32, the engine's parameter torch.int8",
        ),
        (
            Linear(**_INT8, deq_scale=(torch.int64, (4,))),
            _shard(weight=_WEIGHT, deq_scale=torch.full((4,), 0.1)),
            "deq_scale is torch.float32, the engine's parameter torch.int64",
        ),
        (Linear(2, **_INT8).to("meta"), _shard(weight=_WEIGHT), "weight has no memory yet"),
    ],
)
def test_fill_refuses(linear: Linear, shard: LinearShard, said: str) -> None:
    before = {name: value.clone() for name, value in linear.named_parameters() if not value.is_meta}
    with pytest.raises(ShardError) as caught:
        fill(linear, shard)
    assert said in str(caught.value)
    assert str(caught.value).startswith("model.layers.0.mlp.down_proj")
    for name, value in before.items():
        assert torch.equal(getattr(linear, name), value)
