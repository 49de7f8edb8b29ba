"""The parts of the vLLM hook that need no vLLM: filling parameters, groups, what is read of the model, options."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reshard.errors import GroupError, ReshardError, ShardError, UsageError
from reshard.manifest import Manifest, parse_manifest
from reshard.option import OPTION
from reshard.prepare import Cut
from runtime.loader import load_shard
from runtime.serving.vllm.fill import fill
from runtime.serving.vllm.groups import chunks
from runtime.serving.vllm.options import Options, parse
from runtime.serving.vllm.refusals import refuse, refuse_elastic
from runtime.serving.vllm.source import check_same, read_others, replaced
from runtime.shard import LinearShard
from tests.builders import CHECKPOINTS, Spec, build, read_safetensors, write_safetensors
from tests.running import split


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
_INT8 = {"weight": (torch.int8, (4, 3))}


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


def test_fill_casts_weights_that_are_not_quantised() -> None:
    weight = torch.rand(4, 3)
    linear = Linear(weight=(torch.bfloat16, (4, 3)))
    assert fill(linear, _shard("bf16", weight=weight)) == {"torch.float32 to torch.bfloat16"}
    assert torch.equal(linear.weight, weight.bfloat16())


def _as_ascend_makes_it(scheme: str, parts: int, rows: int, columns: int) -> Linear:
    """A linear with the parameters of vllm-ascend's W8A8 methods in a BF16 model, of one rank's sizes.

    From vllm_ascend/quantization/methods: w8a8_dynamic.py and w8a8_static.py (a commit of August 2026).
    """
    own = {"weight": (torch.int8, (rows, columns))}
    own |= dict.fromkeys(("weight_scale", "weight_offset"), (torch.bfloat16, (rows, 1)))
    if scheme == "w8a8_static":
        own |= {"input_scale": (torch.bfloat16, (1,)), "input_offset": (torch.int8, (1,))}
        own |= {"quant_bias": (torch.int32, (rows,)), "deq_scale": (torch.float32, (rows,))}
    return Linear(parts, **own)


@pytest.mark.parametrize(
    ("checkpoint", "scheme", "casts"),
    [
        ("msmodelslim-w8a8_dynamic_sharded", "w8a8_dynamic", {"torch.float32 to torch.bfloat16"}),
        ("msmodelslim_v0-w8a8_mla_static_mlp_dynamic", "w8a8_dynamic", set()),
        ("msmodelslim_v0-w8a8_static", "w8a8_static", {"torch.bfloat16 to torch.int8"}),
    ],
)
def test_fill_gives_ascends_linears_what_modelslim_wrote(
    tmp_path: Path, checkpoint: str, scheme: str, casts: set[str]
) -> None:
    """Float32 scales are rounded to the model's type and offsets made integers, as vllm-ascend's own loader does."""
    split(CHECKPOINTS / checkpoint, tmp_path / "tp2", Cut(2))
    for rank in (0, 1):
        layer = load_shard(tmp_path / "tp2", rank).layer(0)
        for shard, sizes in ((layer.gate_up, (2, 512, 256)), (layer.down, (1, 256, 256))):
            linear = _as_ascend_makes_it(scheme, *sizes)
            assert fill(linear, shard) == casts
            assert {name for name, _ in linear.named_parameters()} == shard.tensors.keys()
            for name, value in shard.tensors.items():
                assert torch.equal(getattr(linear, name), value.to(getattr(linear, name).dtype)), name


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
    linear = _as_ascend_makes_it("w8a8_static", 1, 4, 3)
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


def test_groups_are_consecutive_data_parallel_ranks() -> None:
    """16 processes: data-parallel size 8 over two pipeline stages; what each process knows is its own group."""
    stages = [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    told = [stages[rank % 2] for rank in range(16)]
    assert chunks(told, 4) == [[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]]
    assert chunks(told, 8) == stages
    assert chunks(reversed(told), 4) == chunks(told, 4)


@pytest.mark.parametrize(
    ("groups", "said"),
    [([[0, 1, 2]], "has 3 ranks, which 2 does not divide"), ([[0, 1], [1, 2]], "overlap")],
)
def test_groups_that_cannot_be_cut(groups: list[list[int]], said: str) -> None:
    with pytest.raises(GroupError, match=said):
        chunks(groups, 2)


@pytest.fixture
def cut(tmp_path: Path) -> tuple[Path, Manifest]:
    """(a model, its set's manifest)."""
    build(tmp_path / "model", Spec("fp8_block"))
    split(tmp_path / "model", tmp_path / "tp2", Cut(2))
    return tmp_path / "model", parse_manifest((tmp_path / "tp2" / "manifest.json").read_bytes())


def _files(model: Path) -> list[str]:
    return [str(path) for path in sorted(model.glob("*.safetensors"))]


def _kept(name: str) -> bool:
    return False


def test_everything_is_read_but_what_the_set_holds(cut: tuple[Path, Manifest]) -> None:
    model, manifest = cut
    whole = {name: raw for file in _files(model) for name, raw in read_safetensors(Path(file)).items()}
    read = dict(read_others(_files(model), manifest, _kept))
    held = replaced(manifest)
    assert {name for name in held if name.startswith("model.layers.0.mlp.gate_proj")} == {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_proj.weight_scale_inv",
    }
    assert held < whole.keys()
    assert read.keys() == whole.keys() - held
    for name, value in read.items():
        assert bytes(value.reshape(-1).view(torch.uint8).numpy()) == whole[name][2], name


def test_tensors_that_the_engine_has_no_use_for_are_not_read(cut: tuple[Path, Manifest]) -> None:
    model, manifest = cut
    read = dict(read_others(_files(model), manifest, lambda name: "norm" in name))
    assert read
    assert not any("norm" in name for name in read)


def test_a_dense_tensor_that_the_set_was_not_cut_from(cut: tuple[Path, Manifest]) -> None:
    model, manifest = cut
    extra = "model.layers.0.mlp.down_proj.input_scale"
    write_safetensors(model / "more.safetensors", {extra: ("F32", (1,), bytes(4))})
    with pytest.raises(ShardError, match=f"more.safetensors: {extra} is a DenseFFN tensor that the shard set was not"):
        dict(read_others(_files(model), manifest, _kept))


def test_the_same_files_are_the_same(cut: tuple[Path, Manifest]) -> None:
    check_same(*cut)


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _renamed_tensor(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"mlp.gate_proj", b"mlp.gate_PROJ", 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shorter, "bytes, the shard set was cut from"),
        (_renamed_tensor, "its header has BLAKE3"),
        (Path.unlink, "No such"),
    ],
)
def test_other_files_are_named(cut: tuple[Path, Manifest], change: Any, said: str) -> None:
    model, manifest = cut
    path = model / manifest.source.files[0].name
    change(path)
    with pytest.raises(ShardError, match=said) as caught:
        check_same(model, manifest)
    assert str(path) in str(caught.value)
    assert '"source": "any"' in str(caught.value)


def test_options() -> None:
    assert parse({"shards": "tp8"}) == (Options(Path("tp8")), {})
    told = {
        "shards": "tp8",
        "reduce_dtype": "float32",
        "verify": "digest",
        "source": "any",
        "enable_weights_track": True,
    }
    assert parse(json.loads(json.dumps(told))) == (
        Options(Path("tp8"), torch.float32, "digest", "any"),
        {"enable_weights_track": True},
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "shards is None; it must be the folder that reshard split wrote"),
        (
            {"shards": "x", "shard": "y"},
            "has 'shard'; denseffn_shards takes enable_weights_track, reduce_dtype, ",
        ),
        ({"shards": "s3://b/tp8"}, "shards is 's3://b/tp8'; a set is served from a folder"),
        ({"shards": "x", "num_threads": 8}, "has 'num_threads'"),
        ({"shards": "x", "verify": "no"}, "verify is 'no'; it may be 'header', 'digest'"),
        ({"shards": "x", "source": 1}, "source is 1; it may be 'same', 'any'"),
        ({"shards": "x", "reduce_dtype": "float64"}, "it may be 'bfloat16', 'float16', 'float32'"),
    ],
)
def test_options_that_are_none(extra: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(extra)
    assert said in str(caught.value)
    assert isinstance(caught.value, ReshardError)


def _setup(**changed: Any) -> SimpleNamespace:
    """What is asked of vLLM's config: data-parallel size 16."""
    parallel = {
        "data_parallel_size": 16,
        "tensor_parallel_size": 1,
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
        "enable_elastic_ep": False,
    }
    own = {"lora_config": None, "kv_transfer_config": None}
    parallel |= {key: value for key, value in changed.items() if key in parallel}
    own |= {key: value for key, value in changed.items() if key in own}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **own)


_CONSUMER = SimpleNamespace(is_kv_consumer=True)


@pytest.mark.parametrize(
    ("changed", "device", "said"),
    [
        ({"lora_config": object()}, "cuda", "does not go with LoRA;"),
        ({"use_ubatching": True}, "cuda", "does not go with dual batch overlap (enable_dbo, ubatch_size);"),
        ({"prefill_context_parallel_size": 2}, "cuda", "does not go with prefill context parallelism;"),
        (
            {"kv_transfer_config": _CONSUMER},
            "npu",
            "leave it out and set finegrained_tp_config.mlp_tensor_parallel_size to",
        ),
        ({"tensor_parallel_size": 2}, "cuda", "is 8, tensor-parallel size 2"),
    ],
)
def test_what_the_option_does_not_go_with(changed: dict[str, Any], device: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        refuse(_setup(**changed), {OPTION: 8}, True, 8, device)
    assert str(caught.value).startswith(OPTION)
    assert said in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_setups_that_are_served(device: str) -> None:
    refuse(_setup(), {OPTION: 8}, True, 8, device)
    refuse(_setup(kv_transfer_config=SimpleNamespace(is_kv_consumer=False)), {OPTION: 8}, True, 8, device)
    refuse(_setup(kv_transfer_config=_CONSUMER), {OPTION: 8}, True, 8, "cuda")


def test_without_the_option_the_engine_decides() -> None:
    """Its own layers are filled, whatever runs over them: vllm-ascend's in a decode node, tensor parallelism's."""
    ascends = {"finegrained_tp_config": {"mlp_tensor_parallel_size": 8}}
    refuse(_setup(kv_transfer_config=_CONSUMER), ascends, True, 8, "npu")
    refuse(_setup(tensor_parallel_size=8, lora_config=object(), use_ubatching=True), {}, True, 8, "cuda")


def test_ranks_that_join_later() -> None:
    refuse_elastic(_setup())
    with pytest.raises(UsageError, match="elastic expert parallelism"):
        refuse_elastic(_setup(enable_elastic_ep=True))
