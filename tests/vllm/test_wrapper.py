"""Kimi K2.5, whose language model is DeepSeek's: only its dense layers come from the set, its vision tower does not."""

from pathlib import Path

import pytest
import torch

from reshard.plan.pipeline import Cut
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.vllm import inside
from tests.vllm.inside import Served
from tests.vllm.models import parts, poisoned, write_kimi_k25
from tests.vllm.server import serving

PREFIX = "language_model.model."
DENSE = 2
HELD = {
    f"{PREFIX}layers.{layer}.mlp.{linear}.weight" for layer in range(DENSE) for linear in ("gate_up_proj", "down_proj")
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers and one with experts; the set `tp2` and the model with NaN in its dense layers, `poisoned`."""
    folder = tmp_path_factory.mktemp("kimi")
    model = write_kimi_k25(folder / "model", dense=DENSE)
    split(model, folder / "tp2", Cut(2))
    poisoned(model, folder / "poisoned")
    return folder


def test_each_rank_holds_its_part_and_everything_else(two: Ranks, kimi: Path) -> None:
    whole = two.run(inside.parameters, Served(kimi / "model", data=2))
    ours = two.run(inside.parameters, Served(kimi / "poisoned", kimi / "tp2", data=2, option=2))
    assert whole[0].keys() > HELD
    for kind in ("vision_tower.encoder.blocks.0.mlp.fc0.", "mm_projector.", ".experts.", ".shared_experts.", "lm_head"):
        assert any(kind in name for name in whole[0]), kind
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - HELD:
            assert torch.equal(before[name], after[name]), name
    for name in HELD:
        assert whole[0][name].abs().max() > 0
        for part, after in zip(parts(name, whole[0][name], 2), ours, strict=True):
            assert torch.equal(part, after[name]), name


def test_with_tensor_parallelism_it_fills_what_the_engine_cut(pair: Ranks, kimi: Path) -> None:
    whole = pair.run(inside.parameters, Served(kimi / "model", tensor=2))
    ours = pair.run(inside.parameters, Served(kimi / "poisoned", kimi / "tp2", tensor=2))
    for before, after in zip(whole, ours, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


def test_what_a_split_layer_computes(two: Ranks, tmp_path: Path) -> None:
    """All layers dense: vLLM's CPU build runs no experts over two data-parallel ranks."""
    model, counts = write_kimi_k25(tmp_path / "model"), [[5, 40], [64, 1]]
    split(model, tmp_path / "tp2", Cut(2))
    whole = two.run(inside.forward, Served(model, data=2), counts)
    ours = two.run(inside.forward, Served(model, tmp_path / "tp2", data=2, option=2), counts)
    for before, after in zip(whole, ours, strict=True):
        for unsplit, got in zip(before, after, strict=True):
            assert len(unsplit) == 3
            for a, b in zip(unsplit, got, strict=True):
                assert a.abs().max() > 0.5
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)  # as in test_layers.py


def test_a_server_says_the_same(tmp_path: Path) -> None:
    """Text only, as vLLM runs a model without a processor. With the set, the model's own dense layers are NaN."""
    model = write_kimi_k25(tmp_path / "model")
    split(model, tmp_path / "tp2", Cut(2))
    prompts = ([17, 42, 99], [7, 311, 5, 250, 64, 128])
    answers = []
    for folder, shards in ((model, None), (poisoned(model, tmp_path / "poisoned"), tmp_path / "tp2")):
        with serving(tmp_path, folder, shards=shards, data=2) as server:
            answers.append([server.complete(prompt, 8, rank) for rank, prompt in enumerate(prompts)])
    assert answers[0][0].tokens != answers[0][1].tokens
    for before, after in zip(*answers, strict=True):
        assert after.tokens == before.tokens
        assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)  # as in test_serving.py


def test_another_models_set_is_refused(two: Ranks, kimi: Path, tmp_path: Path) -> None:
    other = write_kimi_k25(tmp_path / "model", layers=4, dense=3)
    said = two.run(inside.load, Served(other, kimi / "tp2", data=2, option=2))
    assert any("its dense layers are 0, 1, the served model's 0, 1, 2" in each for each in said)
