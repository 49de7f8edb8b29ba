"""Sets of o_proj, of the LM head and of the embedding, beside the DenseFFN's, in vLLM's own partition.

The model that the sets go with has other bytes in what they hold: whatever of it were read would show.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.distributed import Ranks
from tests.support.reads import nbytes, spans
from tests.support.running import reshard, split_parts
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import (
    of_parts,
    poisoned,
    with_bf16_o_proj,
    with_fp8_blocks,
    with_int8_o_proj,
    write_llama,
    write_model,
)

ALL = {"denseffn": 2, "lm_head": 2, "embedding": 2, "o_proj": 2}
VOCABULARY = 500  # of 512 rows, with vLLM's padding
Parameters = list[dict[str, torch.Tensor]]

with_fp8_kernels = pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's CPU build makes no linear of FP8 blocks on a processor without AMX",
)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers and one with experts. Beside it the sets, `parts`, and `rest`, poisoned in what they hold."""
    folder = tmp_path_factory.mktemp("odd")
    model = write_model(folder / "model", dense=2, vocabulary=VOCABULARY)
    split_parts(model, folder / "parts", **ALL)
    poisoned(model, folder / "rest", ALL)
    return model


def _rest(model: Path, shards: Path, **more: object) -> Served:
    return Served(model.parent / "rest", shards, **more)  # type: ignore[arg-type]


def _same(whole: Parameters, ours: Parameters) -> None:
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if value.element_size() == 1:  # torch compares no FP8
                value, after[name] = value.view(torch.uint8), after[name].view(torch.uint8)
            assert torch.equal(value, after[name]), name


def test_all_four_of_tensor_parallelism(pair: Ranks, odd: Path) -> None:
    whole = pair.run(inside.parameters, Served(odd, tensor=2))
    ours = pair.run(inside.parameters, _rest(odd, odd.parent / "parts", tensor=2))
    _same(whole, ours)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert [held[name].shape[0] for held in ours] == [256, 256]
        assert ours[1][name][VOCABULARY - 256 - 1].any()
        assert not ours[1][name][VOCABULARY - 256 :].any()
    read = pair.run(inside.parameters, _rest(odd, odd.parent / "parts" / "o_proj", tensor=2))[0]
    assert {name for name, value in read.items() if value.isnan().any()} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.{linear}.weight" for i in (0, 1) for linear in ("gate_up_proj", "down_proj")),
    }


def test_a_rank_reads_its_own_bytes_of_a_part_once_and_nothing_of_it_from_the_model(pair: Ranks, odd: Path) -> None:
    folder, files = odd.parent, sorted((odd.parent / "rest").glob("*.safetensors"))
    held = of_parts({tensor for file in files for tensor in spans(file)}, ALL)
    for rank, found in enumerate(pair.run(inside.reads, _rest(odd, folder / "parts", tensor=2))):
        assert found.others == []
        for file in files:
            rest = spans(file).keys() - held
            assert (found.tensors(file), found.nbytes(file)) == (rest, nbytes(file, rest))
        for key in ALL:
            for number, file in enumerate(sorted((folder / "parts" / key).glob("*.safetensors"))):
                wanted = set(spans(file)) if number == rank else set()
                assert (found.tensors(file), found.nbytes(file)) == (wanted, nbytes(file, wanted))
    (engines, *_) = pair.run(inside.reads, Served(odd, tensor=2))  # that the count can find them
    assert held <= {tensor for file in odd.glob("*.safetensors") for tensor in engines.tensors(file)}


def test_stages_have_what_is_theirs(ranks: Callable[[int], Ranks], odd: Path) -> None:
    """The first has the embedding, the last the LM head, each the o_proj of its own layers."""
    four = ranks(4)
    whole = four.run(inside.parameters, Served(odd, tensor=2, pipeline=2))
    ours = four.run(inside.parameters, _rest(odd, odd.parent / "parts", tensor=2, pipeline=2))
    _same(whole, ours)
    assert ["model.embed_tokens.weight" in held for held in ours] == [True, True, False, False]
    assert ["lm_head.weight" in held for held in ours] == [False, False, True, True]


def test_what_the_engine_builds_whole_is_its_own_beside_others(two: Ranks, odd: Path) -> None:
    """Only the option's layers are cut over data-parallel ranks; a set that stands alone must be used."""
    _same(
        two.run(inside.parameters, Served(odd, odd.parent / "parts" / "denseffn", data=2, option=2)),
        two.run(inside.parameters, Served(odd, odd.parent / "parts", data=2, option=2)),
    )
    for said in two.run(inside.load_unbuilt, Served(odd, odd.parent / "parts" / "lm_head", data=2)):
        assert (
            "tensor-parallel size is 1, the shard set is cut for 2, the engine's LM head is for 1: set it to 2, or "
            "take the set away"
        ) in said
    for said in two.run(inside.load, Served(odd, odd.parent / "parts" / "lm_head", data=2, option=2)):
        assert "denseffn_tensor_parallel_size is 2, and no set of the DenseFFN is there; cut one with" in said


def _another_size(parts: Path, model: Path) -> None:
    shutil.rmtree(parts / "o_proj")
    split_parts(model, parts / "o_proj", o_proj=4)


def _another_vocabulary(parts: Path, model: Path) -> None:
    """Of as many rows, with vLLM's padding."""
    other = write_model(model.parent / "other", dense=2, vocabulary=VOCABULARY + 10)
    shutil.rmtree(parts / "embedding")
    split_parts(other, parts / "embedding", embedding=2)


def _another_name(parts: Path, model: Path) -> None:
    shutil.rmtree(parts / "embedding")
    (parts / "lm_head").rename(parts / "embedding")


def _without_a_manifest(parts: Path, model: Path) -> None:
    (parts / "o_proj" / "manifest.json").unlink()


def _fewer_layers(parts: Path, model: Path) -> None:
    other = write_model(model.parent / "other", layers=2, dense=2)
    shutil.rmtree(parts / "o_proj")
    split_parts(other, parts / "o_proj", o_proj=2)


def _without_one(parts: Path, model: Path) -> None:
    """The last layer has another kind of attention there."""
    last = "model.layers.2.self_attn."
    _other_attention(parts, model, lambda name, value: None if name.startswith(last) else value)


def _smaller_heads(parts: Path, model: Path) -> None:
    _other_attention(parts, model, lambda name, value: value[:, :256] if name.endswith("o_proj.weight") else value, 64)


def _other_attention(
    parts: Path, model: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None], v_head_dim: int = 128
) -> None:
    """o_proj's set is cut from a copy with other tensors."""
    other = Path(shutil.copytree(model, model.parent / "other"))
    for path in other.glob("*.safetensors"):
        changed = {name: change(name, value) for name, value in load_file(path).items()}
        save_file({name: value.clone() for name, value in changed.items() if value is not None}, path)
    (other / "model.safetensors.index.json").unlink()
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"v_head_dim": v_head_dim}))
    shutil.rmtree(parts / "o_proj")
    split_parts(other, parts / "o_proj", o_proj=2)


def _changed(odd: Path, folder: Path, change: Callable[[Path, Path], None]) -> Served:
    parts, model = folder / "parts", Path(shutil.copytree(odd, folder / "model"))
    shutil.copytree(odd.parent / "parts", parts)
    change(parts, model)
    return Served(model, parts, tensor=2, extra={"source": "any"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _another_size,
            "tensor-parallel size is 2, the shard set is cut for 4, the engine's o_proj is for 2: set it to 4, or cut "
            "it with reshard split --part o_proj --tp 2",
        ),
        (
            _another_vocabulary,
            "embedding: vocab_size is 510, the served model's is 500; the set is another model's",
        ),
        (_another_name, "embedding: holds the model's lm_head; name the folder lm_head"),
        (_without_a_manifest, "o_proj: no manifest.json (the shard set is incomplete"),
        (_fewer_layers, "o_proj: num_hidden_layers is 2, the served model's is 3; the set is another model's"),
    ],
)
def test_what_is_refused_before_the_model_is_built(
    pair: Ranks, odd: Path, tmp_path: Path, change: Callable[[Path, Path], None], said: str
) -> None:
    for found in pair.run(inside.load_unbuilt, _changed(odd, tmp_path, change)):
        assert said in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _without_one,
            "o_proj: layers 0-1 have o_proj here, the engine has built it in 0-2; cut the shards from the very model",
        ),
        (
            _smaller_heads,
            "o_proj: attention_size is 256, the engine's model.layers.0.self_attn.o_proj has 512; the set is another",
        ),
    ],
)
def test_what_only_the_layers_tell(
    pair: Ranks, odd: Path, tmp_path: Path, change: Callable[[Path, Path], None], said: str
) -> None:
    for found in pair.run(inside.load, _changed(odd, tmp_path, change)):
        assert said in found


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight"]
)
def test_a_model_that_does_not_load_a_tensor_as_it_is_stored(pair: Ranks, odd: Path, name: str, skipped: bool) -> None:
    """As BailingMoE, which normalizes its LM head: a filled one would be another."""
    served = _rest(odd, odd.parent / "parts", tensor=2)
    for said in pair.run(inside.load_changed, served, name, skipped):
        assert f"{name}: the engine does not load it as it is stored, and shards are filled so; take the set" in said


def test_each_set_must_be_of_the_models_files(pair: Ranks, odd: Path, tmp_path: Path) -> None:
    """Two fine-tunes': what the one set was cut from is not what the model has."""
    other = write_model(tmp_path / "model", dense=2, vocabulary=VOCABULARY, seed=1)
    (other / "model-00002-of-00002.safetensors").rename(other / "tuned.safetensors")
    index = other / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "tuned"))
    parts = Path(shutil.copytree(odd.parent / "parts", tmp_path / "parts"))
    shutil.rmtree(parts / "lm_head")
    split_parts(other, parts / "lm_head", lm_head=2)
    for said in pair.run(inside.load, Served(odd, parts, tensor=2)):
        assert "tuned.safetensors: No such file" in said


def test_another_models_layers(pair: Ranks, tmp_path: Path) -> None:
    """Llama: nothing of the DenseFFN is touched where no set of it is there."""
    model = write_llama(tmp_path / "model")
    held = ("lm_head", "o_proj")
    shards = split_parts(model, tmp_path / "parts", **dict.fromkeys(held, 2))
    rest = poisoned(model, tmp_path / "rest", held)
    _same(
        pair.run(inside.parameters, Served(model, tensor=2)),
        pair.run(inside.parameters, Served(rest, shards, tensor=2)),
    )


@pytest.mark.parametrize(
    ("quantized", "kind", "scale"),
    [
        (with_int8_o_proj, torch.int8, "weight_scale"),
        pytest.param(with_fp8_blocks, torch.float8_e4m3fn, "weight_scale_inv", marks=with_fp8_kernels),
    ],
)
def test_quantized(
    pair: Ranks,
    w8a8: Path,
    dense: Path,
    tmp_path: Path,
    quantized: Callable[[Path, Path], Path],
    kind: torch.dtype,
    scale: str,
) -> None:
    """o_proj with all that compressed-tensors, or DeepSeek, writes beside the weight."""
    model = quantized(w8a8 if kind is torch.int8 else dense, tmp_path / "model")
    keys = ("denseffn", "o_proj", "embedding")
    shards = split_parts(model, tmp_path / "parts", **dict.fromkeys(keys, 2))
    rest = poisoned(model, tmp_path / "rest", keys)
    whole = pair.run(inside.parameters, Served(model, tensor=2, dtype="bfloat16"))
    assert whole[0]["model.layers.0.self_attn.o_proj.weight"].dtype == kind
    assert f"model.layers.2.self_attn.o_proj.{scale}" in whole[0]
    _same(whole, pair.run(inside.parameters, Served(rest, shards, tensor=2, dtype="bfloat16")))


@with_fp8_kernels
def test_converted(pair: Ranks, dense: Path, tmp_path: Path) -> None:
    """The engine builds what the served config.json says: o_proj made BF16 fits where that says so, and only there."""
    model = with_fp8_blocks(dense, tmp_path / "model")
    done = reshard("split", model, tmp_path / "o_proj", "--part", "o_proj=2", "--weights", "bf16", "--quiet")
    assert done.code == 0, done.err
    ours = Served(poisoned(model, tmp_path / "rest", ["o_proj"]), tmp_path / "o_proj", tensor=2, dtype="bfloat16")
    for said in pair.run(inside.load, ours):
        assert (
            "model.layers.0.self_attn.o_proj: the engine's layer has weight, weight_scale_inv, the shard (bf16) weight"
            "; cut the shards from the very model that is served, without --weights"
        ) in said
    whole = with_bf16_o_proj(model, tmp_path / "whole")
    shutil.copy(whole / "config.json", ours.model)
    _same(
        pair.run(inside.parameters, Served(whole, tensor=2, dtype="bfloat16")),
        pair.run(inside.parameters, ours),
    )


def test_a_tied_embedding_fills_the_head_too(pair: Ranks, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", tied=True)
    shards = split_parts(model, tmp_path / "embedding", embedding=2)
    rest = poisoned(model, tmp_path / "rest", ["embedding"])
    whole = pair.run(inside.parameters, Served(model, tensor=2))
    assert of_parts(whole[0], ["lm_head"]) == set()  # the same parameter
    _same(whole, pair.run(inside.parameters, Served(rest, shards, tensor=2)))
    untied = write_llama(tmp_path / "untied")
    head = split_parts(untied, tmp_path / "lm_head", lm_head=2)
    for said in pair.run(inside.load, Served(model, head, tensor=2, extra={"source": "any"})):
        assert "the served model's LM head is its embedding (tie_word_embeddings), which --part embedding cuts" in said
