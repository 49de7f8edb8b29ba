"""Which tensors are split, model by model: frozen, so that no change can put another tensor into a shard unseen.

A checkpoint of every model in `configs/` is made (headers only) and described; the tensors that a split
would take are compared with `data/split_tensors.json`. A change to that file is a decision: only the DenseFFN may be
in it. The layer numbers stand in tests.support.models too, written by hand, and what the other parts have.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reshard.model.naming import parse_tensor
from reshard.model.parts import PARTS
from reshard.source.open import describe, open_source
from reshard.synth.plan import SynthOptions, plan_checkpoint
from reshard.synth.write import write_checkpoint
from tests.support.models import DENSE_LAYERS, FROZEN, MODELS, O_PROJ, TABLES
from tests.support.paths import CONFIGS

SCHEMES = ("bf16", "fp8_block")
PREDICTION_BLOCK = {"deepseek-r1": 61, "deepseek-v3": 61, "glm-4.5": 92}
PREFIXES = {"glm-4.5v": "model.language_model.", "kimi-k2.5": "language_model.model."}
TENSORS_PER_LAYER = {"bf16": 3, "fp8_block": 6}


def _with_few_experts(config: dict[str, Any]) -> None:
    """Full size but for the number of experts: their names are alike, and there may be 384 in each of 60 layers."""
    for level in (config, config.get("text_config", {})):
        level.update({key: min(level[key], 8) for key in ("n_routed_experts", "num_experts") if level.get(key)})


@pytest.fixture(scope="module", params=[(model, scheme) for model in MODELS for scheme in SCHEMES], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """A model, a scheme, and the folder of its full-size checkpoint."""
    model, scheme = request.param
    folder = tmp_path_factory.mktemp("model") / model
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    _with_few_experts(config)
    write_checkpoint(plan_checkpoint(config, SynthOptions(scheme, sparse=True)), folder)
    yield model, scheme, folder
    shutil.rmtree(folder)  # terabytes, if something copied it


def test_every_model_is_frozen() -> None:
    assert sorted(FROZEN) == sorted(DENSE_LAYERS) == sorted(O_PROJ) == sorted(TABLES) == MODELS
    assert all(tuple(sorted(schemes)) == SCHEMES for schemes in FROZEN.values())


def test_split_tensors(case: tuple[str, str, Path]) -> None:
    model, scheme, folder = case
    with open_source(str(folder)) as source:
        checkpoint = describe(source)
    names = [tensor.name for tensor in checkpoint.tensors()]
    assert sorted(names) == FROZEN[model][scheme]
    assert [layer.index for layer in checkpoint.layers] == DENSE_LAYERS[model]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) < set(index)
    # What is left out is no DenseFFN: by another rule than the one that chose.
    for name in set(index) - set(names):
        if re.search(r"(gate|up|down)_proj", name):
            assert re.search(r"\.(experts\.[0-9]+|shared_experts)\.(gate|up|down)_proj\.", name), name
    block = PREDICTION_BLOCK.get(model)
    if block is not None:
        assert f"model.layers.{block}.eh_proj.weight" in index
        assert not [name for name in names if name.startswith(f"model.layers.{block}.")]


def test_split_tensors_of_other_parts(case: tuple[str, str, Path]) -> None:
    """No expert's, no MTP layer's, no other tensor, in the shapes of the published models."""
    model, scheme, folder = case
    o_proj, layers, *shape = O_PROJ[model]
    head, embedding, *table = TABLES[model]
    scales = [-(-size // 128) for size in shape]
    wanted: dict[str, dict[str, list[int]]] = {
        "lm_head": {f"{head}.weight": table},
        "embedding": {f"{embedding}.weight": table},
        "o_proj": {f"{o_proj.format(layer)}.weight": shape for layer in range(layers)},
    }
    if scheme == "fp8_block":
        wanted["o_proj"] |= {f"{o_proj.format(layer)}.weight_scale_inv": scales for layer in range(layers)}
    with open_source(str(folder)) as source:
        for key, tensors in wanted.items():
            found = describe(source, part=PARTS[key])
            assert {tensor.name: list(tensor.shape) for tensor in found.tensors()} == tensors
            left_alone = [line for line in found.warnings if line.startswith("the o_proj of the MTP layer ")]
            assert len(found.warnings) == len(left_alone) == (key == "o_proj" and model in PREDICTION_BLOCK)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_frozen_names_are_the_dense_ffn_alone(model: str, scheme: str) -> None:
    names = FROZEN[model][scheme]
    assert len(set(names)) == len(names) == len(DENSE_LAYERS[model]) * TENSORS_PER_LAYER[scheme]
    for name in names:
        assert "experts" not in name
        assert parse_tensor(name) is not None, name
    prefix = PREFIXES.get(model, "model.")
    assert all(name.startswith(f"{prefix}layers.") for name in names)
    assert sorted({int(name.removeprefix(prefix).split(".")[1]) for name in names}) == DENSE_LAYERS[model]
