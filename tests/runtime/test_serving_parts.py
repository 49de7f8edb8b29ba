"""The parts of the vLLM hook that need no vLLM: groups, what is read of the model, options, refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reshard.checks.serving_option import OPTION
from reshard.errors import GroupError, ManifestError, ReshardError, ShardError, UsageError
from reshard.manifest import Manifest, parse_manifest
from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut
from reshard_runtime.serving.vllm.compat import refuse, refuse_elastic
from reshard_runtime.serving.vllm.groups import chunks
from reshard_runtime.serving.vllm.other_weights import check_same, read_others, replaced
from reshard_runtime.serving.vllm.serving_options import Options, parse
from reshard_runtime.serving.vllm.shard_sets import open_sets
from tests.support.builders import Raw, Spec, build, random_raw, read_safetensors, write_safetensors
from tests.support.running import split, split_parts
from tests.vllm.models import HIDDEN as HIDDEN_SIZE
from tests.vllm.models import of_parts, write_model


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
    read = dict(read_others(_files(model), [manifest], _kept))
    held = replaced([manifest])
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
    read = dict(read_others(_files(model), [manifest], lambda name: "norm" in name))
    assert read
    assert not any("norm" in name for name in read)


def test_a_dense_tensor_that_the_set_was_not_cut_from(cut: tuple[Path, Manifest]) -> None:
    model, manifest = cut
    extra = "model.layers.0.mlp.down_proj.input_scale"
    write_safetensors(model / "more.safetensors", {extra: ("F32", (1,), bytes(4))})
    with pytest.raises(ShardError, match=f"more.safetensors: {extra} is a DenseFFN tensor that the shard set was not"):
        dict(read_others(_files(model), [manifest], _kept))


def _folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), r": is no whole safetensors file \(.+\); copy or"),
        (lambda path: path.write_bytes(b""), r": is no whole safetensors file \(.+\); copy or download it again$"),
        (Path.unlink, ": cannot be read: No such file or directory; copy or download it again$"),
        (_folder_in_its_place, " is a folder"),
    ],
)
def test_a_file_of_the_model_that_cannot_be_read(cut: tuple[Path, Manifest], change: Any, said: str) -> None:
    """safetensors' own message names the descriptor that it was given."""
    model, manifest = cut
    files = _files(model)
    change(Path(files[-1]))
    with pytest.raises(ShardError, match=f"^{files[-1]}{said}"):
        dict(read_others(files, [manifest], _kept))


PREFIX = "language_model.model."
HIDDEN, INTERMEDIATE = 64, 256


def _mlp(module: str, hidden: int, intermediate: int, stacked: bool = False) -> dict[str, Raw]:
    shapes = {"down_proj": (hidden, intermediate)}
    shapes |= {"gate_up_proj": (2 * intermediate, hidden)} if stacked else {}
    shapes |= {} if stacked else dict.fromkeys(("gate_proj", "up_proj"), (intermediate, hidden))
    rng = np.random.default_rng(0)
    return {f"{module}.mlp.{role}.weight": random_raw(rng, "BF16", shape) for role, shape in shapes.items()}


def _wrapper(folder: Path, prefix: str, stacked: bool, beside: dict[str, Raw]) -> Path:
    folder.mkdir()
    dense = _mlp(f"{prefix}layers.0", HIDDEN, INTERMEDIATE, stacked)
    write_safetensors(folder / "model.safetensors", dense | beside, {"format": "pt"})
    text = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps({"model_type": "a_wrapper", "text_config": text}))
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_what_stands_beside_a_language_model_is_the_engines(tmp_path: Path, stacked: bool) -> None:
    """A tower and an MTP block of the very sizes, and another module with layers of its own."""
    beside = _mlp("vision_tower.encoder.layers.0", HIDDEN, INTERMEDIATE) | _mlp("mtp.layers.0", HIDDEN, INTERMEDIATE)
    beside |= _mlp("other.layers.0", 32, 64) | _mlp(f"{PREFIX}layers.1", HIDDEN, INTERMEDIATE, stacked)
    model = _wrapper(tmp_path / "model", PREFIX, stacked, beside)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_nextn_predict_layers"] = 1
    (model / "config.json").write_text(json.dumps(config))
    split(model, tmp_path / "tp2", Cut(2))
    manifest = parse_manifest((tmp_path / "tp2" / "manifest.json").read_bytes())
    assert replaced([manifest]) == _mlp(f"{PREFIX}layers.0", HIDDEN, INTERMEDIATE, stacked).keys()
    read = dict(read_others(_files(model), [manifest], _kept))
    assert read.keys() == beside.keys()


@pytest.mark.parametrize(("prefix", "stacked"), [(PREFIX, True), ("model.", False), ("model.language_model.", True)])
def test_the_same_layers_in_another_form_or_under_another_prefix(tmp_path: Path, prefix: str, stacked: bool) -> None:
    """Neither may reach the engine: it would take the place of what the shards have filled."""
    split(_wrapper(tmp_path / "model", PREFIX, False, {}), tmp_path / "tp2", Cut(2))
    manifest = parse_manifest((tmp_path / "tp2" / "manifest.json").read_bytes())
    other = _wrapper(tmp_path / "other", prefix, stacked, {})
    said = rf"{prefix}layers\.0\.mlp\..* not cut from \(its prefix is language_model\.model\.\)"
    if stacked:
        with pytest.raises(ShardError, match="gate_up_proj"):
            dict(read_others(_files(other), [manifest], lambda name: "down_proj" in name))
    with pytest.raises(ShardError, match=said):
        dict(read_others(_files(other), [manifest], _kept))


def test_the_same_files_are_the_same(cut: tuple[Path, Manifest]) -> None:
    model, manifest = cut
    check_same(model, _files(model), [manifest])


def _shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _renamed_tensor(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"mlp.gate_proj", b"mlp.gate_PROJ", 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shorter, "the shard set was cut from [0-9]+ bytes .*, this file has [0-9]+ bytes"),
        (_renamed_tensor, "the shard set was cut from .* with header .*, this file has .* with header"),
        (Path.unlink, "No such"),
    ],
)
def test_other_files_are_named(cut: tuple[Path, Manifest], change: Any, said: str) -> None:
    model, manifest = cut
    path = model / manifest.source.files[0].name
    change(path)
    with pytest.raises(ShardError, match=said) as caught:
        check_same(model, _files(model), [manifest])
    assert str(path) in str(caught.value)
    assert '"source": "any"' in str(caught.value)


def test_the_engine_must_read_what_the_set_was_cut_from(cut: tuple[Path, Manifest]) -> None:
    """A single file beside an index: the set was cut from one account, the engine reads the other."""
    model, manifest = cut
    single = model / "model.safetensors"
    write_safetensors(single, {"lm_head.weight": ("BF16", (1,), bytes(2))})
    with pytest.raises(ShardError) as caught:
        check_same(model, [str(single)], [manifest])
    for text in ("the set was cut from it", "the engine reads model.safetensors instead", '"source": "any"'):
        assert text.replace("the set", "the shard set") in str(caught.value)


def test_a_draft_that_the_engine_reads_beside_it(cut: tuple[Path, Manifest]) -> None:
    """Without an index vLLM reads every file: the draft's other tensors would take the place of the model's."""
    model, manifest = cut
    held = "model.layers.0.mlp.down_proj.weight"
    write_safetensors(model / "draft.safetensors", {held: ("BF16", (1,), bytes(2))})
    with pytest.raises(ShardError, match=f"draft.safetensors: holds {held}, which the shard set was cut from model-.*"):
        list(read_others(_files(model), [manifest], _kept, same=True))
    assert held not in dict(read_others(_files(model), [manifest], _kept))


ALL = {"denseffn": 2, "lm_head": 4, "embedding": 2, "o_proj": 1}


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, Path]:
    """(a model, the folder with a set of each part)."""
    model = write_model(tmp_path / "model", layers=2, dense=1, vocabulary=500)
    return model, split_parts(model, tmp_path / "parts", **ALL)


def test_sets_of_several_parts(several: tuple[Path, Path]) -> None:
    model, parts = several
    with open_sets(parts) as sets:
        manifests = [stored.manifest for stored in sets]
    assert {manifest.part: manifest.tp_size for manifest in manifests} == ALL
    whole = {name for file in _files(model) for name in read_safetensors(Path(file))}
    assert replaced(manifests) == of_parts(whole, ALL)
    check_same(model, _files(model), manifests)
    read = dict(read_others(_files(model), manifests, _kept, same=True))
    assert read.keys() == whole - of_parts(whole, ALL)
    assert len(of_parts(whole, ALL)) == 3 + 1 + 1 + 2
    with open_sets(parts / "o_proj") as (one,):
        assert dict(read_others(_files(model), [one.manifest], _kept)).keys() == whole - of_parts(whole, ["o_proj"])


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("lm_head", "other.lm_head.weight"),
        ("embedding", "language_model.model.embed_tokens.weight"),
        ("o_proj", "model.layers.1.self_attn.o_proj.weight_scale"),
    ],
)
def test_a_tensor_of_a_part_that_its_set_was_not_cut_from(several: tuple[Path, Path], key: str, extra: str) -> None:
    """A scale that the set lacks, or a weight of the same size under another prefix."""
    model, parts = several
    shape = (HIDDEN_SIZE, 1) if extra.endswith("scale") else (500, HIDDEN_SIZE)
    write_safetensors(model / "more.safetensors", {extra: random_raw(np.random.default_rng(0), "F32", shape)})
    with open_sets(parts) as sets:
        manifests = [stored.manifest for stored in sets]
    name = PARTS[key].name
    with pytest.raises(
        ShardError, match=f"more.safetensors: {extra} is a {name} tensor that the shard set was not cut"
    ):
        dict(read_others(_files(model), manifests, _kept))


def test_sets_that_cannot_be_told(several: tuple[Path, Path]) -> None:
    _, parts = several
    (parts / "o_proj" / "manifest.json").unlink()
    with (
        pytest.raises(ManifestError, match=r"parts/o_proj: no manifest.json \(the shard set is incomplete"),
        open_sets(parts),
    ):
        pass
    shutil.rmtree(parts / "o_proj")
    with (
        pytest.raises(ShardError, match=r"parts: lacks o_proj, cut together with embedding"),
        open_sets(parts),
    ):
        pass
    (parts / "lm_head").rename(parts / "o_proj")
    with (
        pytest.raises(ShardError, match="parts/o_proj: holds the model's lm_head; name the folder lm_head"),
        open_sets(parts),
    ):
        pass
    with pytest.raises(ManifestError, match=r"nowhere: no manifest.json \(no folder\)"), open_sets(parts / "nowhere"):
        pass


def test_a_set_of_several_that_is_replaced(several: tuple[Path, Path]) -> None:
    _, parts = several
    manifest = parts / "embedding" / "manifest.json"
    shutil.copy(manifest, parts / "copy")
    with (
        pytest.raises(ManifestError, match=r"embedding/manifest\.json: was replaced while the set was read"),
        open_sets(parts),
    ):
        (parts / "copy").replace(manifest)


def test_options() -> None:
    assert parse({"shards": "tp8"}) == (Options(Path("tp8")), {})
    told = {
        "shards": "tp8",
        "reduce_dtype": "float32",
        "max_tokens": 64,
        "verify": "digest",
        "source": "any",
        "enable_weights_track": True,
    }
    assert parse(json.loads(json.dumps(told))) == (
        Options(Path("tp8"), torch.float32, 64, "digest", "any"),
        {"enable_weights_track": True},
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "shards is None; it must be the folder that reshard split wrote"),
        (
            {"shards": "x", "shard": "y"},
            "has 'shard'; denseffn_shards takes enable_weights_track, max_tokens, reduce_dtype, ",
        ),
        ({"shards": "s3://b/tp8"}, "shards is 's3://b/tp8'; a set is served from a folder"),
        ({"shards": "x", "num_threads": 8}, "has 'num_threads'"),
        ({"shards": "x", "verify": "no"}, "verify is 'no'; it may be 'header', 'digest'"),
        ({"shards": "x", "source": 1}, "source is 1; it may be 'same', 'any'"),
        ({"shards": "x", "max_tokens": 0}, "max_tokens is 0; it must be a number of tokens, 1 or more"),
        ({"shards": "x", "max_tokens": True}, "max_tokens is True"),
        ({"shards": "x", "max_tokens": "64"}, "max_tokens is '64'"),
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
        "pipeline_parallel_size": 1,
        "use_ubatching": False,
        "prefill_context_parallel_size": 1,
        "enable_elastic_ep": False,
    }
    parallel |= {key: value for key, value in changed.items() if key in parallel}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        lora_config=changed.get("lora_config"),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=changed.get("enable_sp", False))),
    )


def _refuse(config: SimpleNamespace, additional: dict[str, Any], *, ascend: bool = False, **sizes: int) -> None:
    """sizes: of the set of each part."""
    refuse(config, additional, True, {PARTS[key]: size for key, size in sizes.items()}, ascend=ascend)


_XLITE = {"xlite_graph_config": {"enabled": True}}


@pytest.mark.parametrize(
    ("changed", "additional", "said"),
    [
        ({"lora_config": object()}, {}, "does not go with LoRA;"),
        ({"use_ubatching": True}, {}, "does not go with dual batch overlap (enable_dbo, ubatch_size);"),
        ({"prefill_context_parallel_size": 2}, {}, "does not go with prefill context parallelism;"),
        ({"tensor_parallel_size": 4, "enable_sp": True}, {}, "does not go with sequence parallelism"),
        ({}, _XLITE, "does not go with vllm-ascend's xlite_graph_config"),
        ({"tensor_parallel_size": 3}, {}, "is 8; with data-parallel size 16 and tensor-parallel size 3 it may be 3, "),
    ],
)
def test_what_the_option_does_not_go_with(changed: dict[str, Any], additional: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        _refuse(_setup(**changed), {OPTION: 8, **additional}, denseffn=8)
    assert str(caught.value).startswith(OPTION)
    assert said in str(caught.value)


def test_the_option_wants_the_dense_ffns_set() -> None:
    with pytest.raises(
        UsageError, match=f"{OPTION} is 8, and no set of the DenseFFN is there; cut one with reshard split"
    ):
        _refuse(_setup(), {OPTION: 8}, lm_head=1, embedding=1)


def test_a_dense_ffn_that_the_engine_has_whole_is_its_own_beside_other_sets() -> None:
    _refuse(_setup(), {}, denseffn=8, lm_head=1)
    with pytest.raises(UsageError, match=f"{OPTION} is not set, the shard set is cut for 8"):
        _refuse(_setup(), {}, denseffn=8)
    with pytest.raises(UsageError, match=f"{OPTION} is 4, the shard set is cut for 8"):
        _refuse(_setup(), {OPTION: 4}, denseffn=8, lm_head=1)
    with pytest.raises(UsageError, match=f"{OPTION} is not set, the shard set is cut for 8, .* are for 2: set it to 8"):
        _refuse(_setup(tensor_parallel_size=2), {}, denseffn=8, lm_head=2)


def test_setups_that_are_served() -> None:
    _refuse(_setup(), {})
    _refuse(_setup(), {OPTION: 8}, denseffn=8)
    _refuse(_setup(tensor_parallel_size=4), {OPTION: 8}, denseffn=8)
    _refuse(_setup(enable_sp=True), {OPTION: 8}, denseffn=8)  # nothing to it at tensor-parallel size 1


@pytest.mark.parametrize("additional", [{}, {OPTION: 8}, _XLITE])
def test_what_the_engine_itself_has_cut_is_its_own_affair(additional: dict[str, Any]) -> None:
    """Its layers are filled, whatever runs over them. The option says no more there than tensor parallelism does."""
    setup = _setup(tensor_parallel_size=8, lora_config=object(), use_ubatching=True, enable_sp=True)
    _refuse(setup, additional, denseffn=8)


_HEAD = PARTS["lm_head"].option


@pytest.mark.parametrize(
    ("tensor", "head", "ascend", "sizes", "said"),
    [
        (1, 8, True, {"lm_head": 8, "o_proj": 4}, None),
        (1, 0, True, {"lm_head": 8, "o_proj": 4}, None),  # one folder for nodes with and without the sizes
        (4, 0, False, {"lm_head": 4, "o_proj": 4}, None),
        (4, 0, True, {"o_proj": 8}, None),  # FLASHCOMM2 may cut it so: its layers tell
        (1, 3, True, {"lm_head": 8}, f"{_HEAD} is 3; with data-parallel size 16 it may be 1, 2, 4, 8 or 16"),
        (
            *(1, 4, True, {"lm_head": 8, "o_proj": 4}),
            f"{_HEAD} is 4, the shard set is cut for 8, the engine's LM head is for 4: set it to 8, or cut it with "
            "reshard split --part lm_head --tp 4",
        ),
        (
            *(1, 0, True, {"lm_head": 8}),
            f"{_HEAD} is not set, the shard set is cut for 8, the engine's LM head is for 1: set it to 8, or take the "
            "set away",
        ),
        (
            *(4, 0, False, {"o_proj": 8, "lm_head": 4}),
            "tensor-parallel size is 4, the shard set is cut for 8, the engine's o_proj is for 4: set it to 8, or cut "
            "it with reshard split --part o_proj --tp 4",
        ),
        (
            1,
            8,
            False,
            {"lm_head": 8},
            "tensor-parallel size is 1, the shard set is cut for 8",
        ),  # nothing reads it there
    ],
)
def test_a_set_of_another_size_than_the_options_say(
    tensor: int, head: int, ascend: bool, sizes: dict[str, int], said: str | None
) -> None:
    """Before anything is built."""
    additional = {"finegrained_tp_config": {_HEAD: head}}
    setup = _setup(tensor_parallel_size=tensor)
    if said is None:
        _refuse(setup, additional, ascend=ascend, **sizes)
    else:
        with pytest.raises(UsageError) as caught:
            _refuse(setup, additional, ascend=ascend, **sizes)
        assert said in str(caught.value)


def test_ranks_that_join_later() -> None:
    refuse_elastic(_setup())
    with pytest.raises(UsageError, match="elastic expert parallelism"):
        refuse_elastic(_setup(enable_elastic_ep=True))
