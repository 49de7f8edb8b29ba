"""What the plugin refuses, in vLLM's own workers: on all ranks, with one message."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard.plan.pipeline import Cut
from tests.support.distributed import Ranks
from tests.support.reads import spans
from tests.support.running import reshard, split
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import of_parts, poisoned, write_llama, write_model

RANK_1 = "denseffn-rank-00001-of-00002.safetensors"
GetRanks = Callable[[int], Ranks]


def _loads(group: Ranks, served: Served) -> None:
    assert group.run(inside.load, served) == ["loaded"] * group.size


def _fails(group: Ranks, served: Served, *wanted: str) -> None:
    """Every rank says all of `wanted`, the one whose fault it is and those that it tells."""
    for said in group.run(inside.load, served):
        assert said != "loaded"
        for text in wanted:
            assert text in said


@pytest.fixture
def shards(dense: Path, tmp_path: Path) -> Path:
    """A copy of the set to damage."""
    return Path(shutil.copytree(dense.parent / "tp2", tmp_path / "tp2"))


def _copied(shards: Path, other: Path) -> None:
    shutil.copy(other, shards / RANK_1)


def _truncated(shards: Path, other: Path) -> None:
    data = (shards / RANK_1).read_bytes()
    (shards / RANK_1).write_bytes(data[:-100])


def _gone(shards: Path, other: Path) -> None:
    (shards / RANK_1).unlink()


def _rank_0(shards: Path, other: Path) -> None:
    shutil.copy(shards / RANK_1.replace("00001", "00000", 1), shards / RANK_1)


def _of_another_model(shards: Path, other: Path) -> None:
    shutil.copy(other / RANK_1, shards / RANK_1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncated, ("bytes, manifest.json says",)),
        (_gone, ("No such file",)),
        (_rank_0, ("tp_rank '0', manifest.json says '1'",)),
        (_of_another_model, ("manifest.json says",)),
    ],
)
def test_one_ranks_bad_shard_stops_all(
    two: Ranks, dense: Path, mixed: Path, shards: Path, damage: Callable[[Path, Path], None], said: tuple[str, ...]
) -> None:
    damage(shards, mixed.parent / "tp2")
    _fails(two, Served(dense, shards, data=2, option=2), RANK_1, *said)


def test_digests_are_compared_on_request(two: Ranks, dense: Path, shards: Path) -> None:
    data = bytearray((shards / RANK_1).read_bytes())
    data[-100:] = bytes(100)
    (shards / RANK_1).write_bytes(data)
    served = Served(dense, shards, data=2, option=2)
    _loads(two, served)
    _fails(two, Served(dense, shards, data=2, option=2, extra={"verify": "digest"}), "BLAKE3", RANK_1)


@pytest.mark.parametrize(
    ("at", "time", "said"),
    [
        ("open_sets", 2, "tp2: was replaced since the model was built; start the engine again"),
        ("fill_from", 1, "manifest.json: was replaced while the set was read; load it again"),
    ],
)
def test_a_set_that_is_replaced_meanwhile(
    two: Ranks, dense: Path, shards: Path, tmp_path: Path, at: str, time: int, said: str
) -> None:
    """By another fine-tune's."""
    split(write_model(tmp_path / "model", seed=1), tmp_path / "other", Cut(2))
    served = Served(dense, shards, data=2, option=2, extra={"source": "any"})
    for found in two.run(inside.load_while_replaced, served, tmp_path / "other", at, time):
        assert said in found
    _loads(two, served)


def test_a_set_of_another_model(two: Ranks, dense: Path, mixed: Path) -> None:
    served = Served(dense, mixed.parent / "tp2", data=2, option=2)
    _fails(two, served, "its dense layers are 0, 1, the served model's 0, 1, 2")


def test_a_set_of_other_sizes(two: Ranks, dense: Path, tmp_path: Path) -> None:
    split(write_model(tmp_path / "model", intermediate=1024), tmp_path / "tp2", Cut(2))
    served = Served(dense, tmp_path / "tp2", data=2, option=2)
    _fails(two, served, "intermediate_size is 1024, the served model's is 512")


def test_a_set_of_a_model_of_the_same_sizes(two: Ranks, dense: Path, tmp_path: Path) -> None:
    """Another fine-tune's: its file has another header, or size, or name; `source` says that it is meant."""
    other = write_model(tmp_path / "model", seed=1)
    first = other / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    first.unlink()
    save_file(tensors, other / "dense.safetensors", metadata={"format": "pt", "of": "another"})
    (other / "model.safetensors.index.json").unlink()
    split(other, tmp_path / "tp2", Cut(2))
    _fails(two, Served(dense, tmp_path / "tp2", data=2, option=2), "dense.safetensors", '"source": "any"')
    _loads(two, Served(dense, tmp_path / "tp2", data=2, option=2, extra={"source": "any"}))


def test_an_unfinished_set(two: Ranks, dense: Path, shards: Path) -> None:
    (shards / "manifest.json").unlink()
    _fails(two, Served(dense, shards, data=2, option=2), "no manifest.json", "--resume")


def test_the_option_must_be_the_sets_size(two: Ranks, dense: Path) -> None:
    served = Served(dense, dense.parent / "tp4", data=2, option=2)
    _fails(two, served, "denseffn_tensor_parallel_size is 2, the shard set is cut for 4: cut it with")


def test_without_the_option_the_layers_are_whole(two: Ranks, dense: Path) -> None:
    _fails(two, Served(dense, dense.parent / "tp2", data=2), "cut for 2, the engine's dense layers are for 1")


def test_an_option_of_another_name(two: Ranks, dense: Path) -> None:
    served = Served(dense, dense.parent / "tp2", data=2, additional={"denseffn_tp_size": 2})
    _fails(two, served, "denseffn_tp_size in the additional config is no option")


def test_a_model_without_experts_has_no_lockstep(ranks: GetRanks, dense: Path, tmp_path: Path) -> None:
    """vLLM runs each data-parallel rank of such a model as an engine of its own, of data-parallel size 1."""
    model = write_llama(tmp_path / "model")
    served = Served(model, dense.parent / "tp2", option=2)
    _fails(ranks(1), served, "denseffn_tensor_parallel_size is 2, and the model has no MoE layers")


def test_dense_layers_that_are_not_deepseeks(pair: Ranks, tmp_path: Path) -> None:
    """Another model's set can be cut; its layers would keep whatever their memory held."""
    model = write_llama(tmp_path / "model")
    split(model, tmp_path / "tp2", Cut(2))
    said = "layers 0, 1 are dense here, the engine has built none as DeepSeek's dense MLP"
    _fails(pair, Served(model, tmp_path / "tp2", tensor=2), said)


@pytest.mark.parametrize("strategy", ["eager", "prefetch"])
def test_strategies_that_read_whole_files(two: Ranks, dense: Path, strategy: str) -> None:
    served = Served(dense, dense.parent / "tp2", data=2, option=2, engine={"safetensors_load_strategy": strategy})
    _fails(two, served, f"safetensors_load_strategy '{strategy}' reads whole files")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"enable_multithread_load": True}, "model_loader_extra_config has 'enable_multithread_load'"),
        ({"shard": "x"}, "model_loader_extra_config has 'shard'"),
        ({"reduce_dtype": "int8"}, "reduce_dtype is 'int8'; it may be 'bfloat16', 'float16', 'float32'"),
        ({"shards": ""}, "shards is ''"),
    ],
)
def test_unknown_keys_and_values(two: Ranks, dense: Path, extra: dict[str, object], said: str) -> None:
    _fails(two, Served(dense, dense.parent / "tp2", data=2, option=2, extra=extra), said)


def test_a_quantized_set_for_a_model_that_is_not(two: Ranks, dense: Path, tmp_path: Path) -> None:
    done = reshard("split", dense, tmp_path / "tp2", "--tp", 2, "--weights", "w8a8", "--quiet")
    assert done.code == 0, done.err
    _fails(
        two,
        Served(dense, tmp_path / "tp2", data=2, option=2),
        "the engine's layer has weight, the shard (w8a8_dynamic) weight, weight_offset, weight_scale",
    )


def test_dense_ffn_bytes_of_the_model_are_not_read(two: Ranks, dense: Path, tmp_path: Path) -> None:
    """The same model with a hole where its DenseFFN is, filled with what would poison any result."""
    model = poisoned(dense, tmp_path / "model")
    whole = two.run(inside.parameters, Served(dense, data=2))
    served = Served(model, dense.parent / "tp2", data=2, option=2)
    for found in two.run(inside.reads, served):
        assert found.others == []
        for file in model.glob("*.safetensors"):
            assert found.tensors(file) == spans(file).keys() - of_parts(spans(file))
    ours = two.run(inside.parameters, served)
    theirs = two.run(inside.parameters, Served(model, data=2))
    name = "model.layers.0.mlp.down_proj.weight"
    assert bool(theirs[0][name].isnan().all())
    for rank, (before, after) in enumerate(zip(whole, ours, strict=True)):
        assert torch.equal(before[name].chunk(2, dim=1)[rank], after[name])
        assert not any(bool(value.isnan().any()) for value in after.values())


def test_a_file_of_the_model_that_was_cut_short(two: Ranks, dense: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    rest = model / "model-00002-of-00002.safetensors"
    rest.write_bytes(rest.read_bytes()[:-8])
    served = Served(model, dense.parent / "tp2", data=2, option=2, extra={"source": "any"})
    _fails(two, served, f"ShardError: {rest}: is no whole safetensors file (", "; copy or download it again")


def test_a_model_whose_dense_ffn_was_taken_out(two: Ranks, dense: Path, tmp_path: Path) -> None:
    """It is not needed any more; `source` says that the files are others."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "model.safetensors.index.json").unlink()
    _fails(two, Served(model, dense.parent / "tp2", data=2, option=2), "model-00001-of-00002.safetensors")
    _loads(two, Served(model, dense.parent / "tp2", data=2, option=2, extra={"source": "any"}))
