"""vllm-ascend's own split of o_proj, the LM head and the embedding, filled from sets of these parts.

The model that the sets go with is poisoned in what they hold: whatever of it were read would show.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ascend import inside
from tests.ascend.inside import DECODE_NODE, Served
from tests.ascend.models import Model, close, same, with_parts, with_w8a8_o_proj
from tests.support.builders import read_folder
from tests.support.conversions import to_torch, values_of
from tests.support.distributed import Ranks
from tests.support.reads import nbytes, spans
from tests.support.running import reshard, split_parts
from tests.vllm.inside import tokens
from tests.vllm.models import of_parts, poisoned

SIZES = {"denseffn": 2, "lm_head": 4, "embedding": 2, "o_proj": 4}
LMHEAD, EMBEDDING, OPROJ = (f"{name}_tensor_parallel_size" for name in ("lmhead", "embedding", "oproj"))
# What vllm-ascend wants beside o_proj's size: graph mode in a decode node, with the scheduler that leaves prefill out.
NODE = {"engine": DECODE_NODE | {"enforce_eager": False}, "additional": {"recompute_scheduler_enable": True}}
FOUR = {"data": 4, "mlp": 2, "finegrained": {LMHEAD: 4, EMBEDDING: 2, OPROJ: 4}, **NODE}
CHECKPOINTS = ["tiny-bf16", "msmodelslim-w8a8_dynamic_sharded", "msmodelslim_v0-w8a8_static"]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Each checkpoint with sets of all four parts, made once."""
    made: dict[str, Model] = {}

    def of(name: str) -> Model:
        if name not in made:
            made[name] = with_parts(name, tmp_path_factory.mktemp("parts"), SIZES)
        return made[name]

    return of


def _loaded(ranks: Ranks, own: Served, ours: Served) -> list[inside.Tensors]:
    """What is held before it is processed; it is the same by both loaders, and after it is processed."""
    filled = ranks.run(inside.parameters, ours)
    for theirs, each in zip(ranks.run(inside.parameters, own), filled, strict=True):
        for own_tensors, our_tensors in zip(theirs, each, strict=True):
            same(own_tensors, our_tensors)
    return [before for before, _ in filled]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_four_in_groups_of_their_own_sizes(four: Ranks, parts: Callable[[str], Model], name: str) -> None:
    held = _loaded(four, *parts(name).both(**FOUR))
    assert [len(tensors["lm_head.weight"]) for tensors in held] == [128] * 4
    assert [len(tensors["model.embed_tokens.weight"]) for tensors in held] == [256] * 4
    last = held[3]["lm_head.weight"]  # of rows 384 to 511, of which the vocabulary has 116
    assert last[115].any()
    assert not last[116:].any()
    biases = [tensors.get("model.layers.0.self_attn.o_proj.quant_bias") for tensors in held]
    assert all((bias is not None and bool(bias.any())) is ("static" in name) for bias in biases)


@pytest.mark.parametrize("name", ["tiny-bf16", "msmodelslim_v0-w8a8_static"])
def test_a_rank_reads_its_own_bytes_of_a_part_once_and_nothing_of_it_from_the_model(
    four: Ranks, parts: Callable[[str], Model], name: str
) -> None:
    """But rank 0's quant_bias, which every rank has."""
    made = parts(name)
    own, ours = made.both(**FOUR)
    files = sorted(made.rest.glob("*.safetensors"))
    held = of_parts({tensor for file in files for tensor in spans(file)}, SIZES)
    for rank, found in enumerate(four.run(inside.reads, ours)):
        assert found.others == []
        for file in files:
            rest = spans(file).keys() - held
            assert (found.tensors(file), found.nbytes(file)) == (rest, nbytes(file, rest))
        for key, size in SIZES.items():
            for number, file in enumerate(sorted((made.shards / key).glob("*.safetensors"))):
                added = (".down_proj.quant_bias", ".o_proj.quant_bias") if number == 0 else ()
                wanted = {each for each in spans(file) if number == rank % size or each.endswith(added)}
                assert (found.tensors(file), found.nbytes(file)) == (wanted, nbytes(file, wanted))
    whole = sorted(made.whole.glob("*.safetensors"))
    (engines, *_) = four.run(inside.reads, own)  # that the count can find them
    assert held <= {tensor for file in whole for tensor in engines.tensors(file)}


IDS = torch.tensor([0, 127, 128, 255, 256, 383, 384, 499])
"""The first and the last of ranks of 4 and of 2."""


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_engines_forward_of_what_is_filled(four: Ranks, parts: Callable[[str], Model], name: str) -> None:
    """Bit for bit that of the engine's own loading, and near float64's of the weights in the files.

    For o_proj's static W8A8 there is only the first.
    """
    made = parts(name)
    by_loader = [four.run(inside.forward_of_parts, served, IDS) for served in made.both(**FOUR)]
    for own, ours in zip(*by_loader, strict=True):
        same(own, ours)
    stored = read_folder(made.whole)
    head = to_torch(stored["lm_head.weight"]).double()
    for rank, found in enumerate(by_loader[1]):
        assert len(found) == 5
        assert torch.equal(found.pop("model.embed_tokens"), to_torch(stored["model.embed_tokens.weight"])[IDS])
        close(found.pop("lm_head"), tokens(rank, len(IDS), head.shape[1], torch.bfloat16).double() @ head.T)
        for module, result in found.items():
            if "static" not in name:
                weight = values_of(module, stored).double()
                close(result, tokens(rank, len(IDS), weight.shape[1], torch.bfloat16).double() @ weight.T)


def test_what_is_filled_is_vllm_ascends(four: Ranks, parts: Callable[[str], Model]) -> None:
    for served in parts("tiny-bf16").both(**FOUR):
        for rank, found in enumerate(four.run(inside.of_parts, served)):
            layers = {name: each for name, each in found.items() if name.endswith("o_proj")}
            assert set(layers.values()) == {("AscendRowParallelLinear", "OProjRowParallelOp", rank, 4)}
            assert len(layers) >= 2
            assert found["lm_head"] == ("AscendParallelLMHead", "NoneType", rank, 4)
            embedding = ("AscendVocabParallelEmbedding", "NoneType", rank % 2, 2)
            assert found["model.embed_tokens"] == embedding


def test_tensor_parallelism(two: Ranks, parts: Callable[[str], Model], tmp_path: Path) -> None:
    """quant_bias is on every rank, as by vllm-ascend's own loader: its sequence parallelism adds it on each."""
    made = parts("msmodelslim_v0-w8a8_static")
    own, ours = made.both(tensor=2)
    shards = split_parts(made.whole, tmp_path / "parts", **dict.fromkeys(SIZES, 2))
    _loaded(two, own, dataclasses.replace(ours, shards=shards))


def test_converted(two: Ranks, parts: Callable[[str], Model], tmp_path: Path) -> None:
    """vllm-ascend builds what the model's description says: o_proj made W8A8 fits where that says so, not elsewhere."""
    made = parts("tiny-bf16")
    shards = tmp_path / "o_proj"
    done = reshard("split", made.whole, shards, "--part", "o_proj=2", "--weights", "w8a8", "--quiet")
    assert done.code == 0, done.err
    own, ours = made.both(data=2, finegrained={OPROJ: 2}, **NODE)
    ours = dataclasses.replace(ours, model=poisoned(made.whole, tmp_path / "rest", ["o_proj"]), shards=shards)
    for said in two.run(inside.load, ours):
        assert (
            "self_attn.o_proj: the engine's layer has weight, the shard (w8a8_dynamic) weight, weight_offset, "
            "weight_scale; cut the shards from the very model that is served, without --weights"
        ) in said
    own = dataclasses.replace(own, model=with_w8a8_o_proj(made.whole, tmp_path / "whole"))
    shutil.copy(own.model / "quant_model_description.json", ours.model)
    _loaded(two, own, ours)


def test_parts_without_their_option_are_the_engines(two: Ranks, parts: Callable[[str], Model]) -> None:
    """A prefill node takes no size for o_proj, and may be given the same folder. The model has what is not filled."""
    made = parts("tiny-bf16")
    layout = {"data": 2, "mlp": 2, "finegrained": {EMBEDDING: 2}, **NODE}
    own, ours = made.both(**layout)
    ours = dataclasses.replace(ours, model=made.whole)
    _loaded(two, own, ours)
    for said in two.run(inside.warnings, ours):
        for what, key, option in (("LM head", "lm_head", LMHEAD), ("o_proj", "o_proj", OPROJ)):
            line = (
                f"denseffn_shards: {made.shards / key}: the shard set is cut for 4, the engine's {what} is for 1: the "
                f"part is loaded whole, from the model; for less memory and reading, set {option}, or the "
                "tensor-parallel size, to 4"
            )
            assert said.count(line) == 1


def test_another_size_than_the_options_is_refused(two: Ranks, parts: Callable[[str], Model]) -> None:
    made = parts("tiny-bf16")
    for key, option, what in (
        ("lm_head", LMHEAD, "LM head"),
        ("o_proj", OPROJ, "o_proj"),
    ):
        _, ours = made.both(data=2, finegrained={option: 2}, **NODE)
        for said in two.run(inside.load_unbuilt, dataclasses.replace(ours, shards=made.shards / key)):
            assert (
                f"{option} is 2, the shard set is cut for 4, the engine's {what} is for 2: cut it with reshard split "
                f"--part {key} --tp 2"
            ) in said
