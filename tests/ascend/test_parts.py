"""vllm-ascend's own split of o_proj, the LM head and the embedding, filled from sets of these parts.

The model that the sets go with is poisoned in what they hold: whatever of it were read would show.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ascend import inside
from tests.ascend.inside import DECODE_NODE, Served
from tests.ascend.models import Model, same, with_parts
from tests.support.distributed import Ranks
from tests.support.running import split_parts

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


def test_parts_without_their_option_are_the_engines(two: Ranks, parts: Callable[[str], Model]) -> None:
    """A prefill node takes no size for o_proj, and may be given the same folder. The model has what is not filled."""
    made = parts("tiny-bf16")
    layout = {"data": 2, "mlp": 2, "finegrained": {EMBEDDING: 2}, **NODE}
    own, ours = made.both(**layout)
    ours = dataclasses.replace(ours, model=made.whole)
    _loaded(two, own, ours)
    for said in two.run(inside.warnings, ours):
        for what, key, size in (("the LM head", "lm_head", 4), ("o_proj of layers 0-2", "o_proj", 4)):
            line = (
                f"the engine has built {what} whole, and loads it from the model: {made.shards / key} is cut for {size}"
            )
            assert sum(line in each for each in said) == 1


def test_another_size_than_the_options_is_refused(two: Ranks, parts: Callable[[str], Model]) -> None:
    made = parts("tiny-bf16")
    for key, option, what in (
        ("lm_head", LMHEAD, "LM head"),
        ("o_proj", OPROJ, "o_proj"),
    ):
        _, ours = made.both(data=2, finegrained={option: 2}, **NODE)
        for said in two.run(inside.load, dataclasses.replace(ours, shards=made.shards / key)):
            assert (
                f"{key}: cut for 4, the engine's {what} is for 2; cut it with reshard split --part {key} --tp 2, or "
                f"have the engine cut it for 4 ({option}, or its tensor-parallel size)"
            ) in said
