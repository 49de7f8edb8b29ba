"""`reshard verify --source` computes what the model computes, and says where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.model.naming import CONFIG
from reshard.plan.pipeline import Cut
from reshard.source.open import describe, open_source
from tests.support.activations import CASES, Case, checkpoint_of
from tests.support.builders import Spec
from tests.support.manifests import edit_manifest
from tests.support.running import reshard
from tests.support.unsplit import exact
from tests.support.verifying import made, split, verify

HIDDEN, INTERMEDIATE = 256, 512
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@by_case
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("recipe", ["bf16", "modelslim_dynamic", "modelslim_static"])
def test_what_split_writes_is_clean(tmp_path: Path, case: Case, layout: Any, recipe: str) -> None:
    config = {
        **case.config,
        **({"mlp_layer_types": ["dense", "dense", "sparse"]} if "swiglu_limit" in case.config else {}),
    }
    source, shards = made(tmp_path, Spec(recipe, computable=True, config=config), Cut(4, layout))
    with open_source(str(source)) as opened:
        assert [layer.activation for layer in describe(opened).layers] == [case.activation] * 2
    assert verify(shards, source).clean()


@by_case
def test_the_unsplit_layer_is_transformers_mlp(tmp_path: Path, case: Case) -> None:
    mlp, x_TH = case.mlp(HIDDEN, INTERMEDIATE), torch.randn(8, HIDDEN, dtype=torch.float64)
    found = exact(checkpoint_of(mlp, tmp_path / "model", case.config), x_TH)
    torch.testing.assert_close(found, mlp.double()(x_TH), rtol=1e-10, atol=1e-12)


@by_case
def test_a_value_in_a_wrong_place_is_found(tmp_path: Path, case: Case) -> None:
    """In a layer with a limit too, which is the same for many values of gate and up."""
    mlp = case.mlp(HIDDEN, INTERMEDIATE)
    source = checkpoint_of(mlp, tmp_path / "model", case.config)
    shards = split(source, tmp_path / "shards", Cut(2))
    weight = mlp.up_proj.weight.clone()
    weight[3, [5, 6]] = weight[3, [6, 5]]
    mlp.up_proj.weight.data = weight
    swapped = checkpoint_of(mlp, tmp_path / "swapped", case.config)
    assert [finding.check for finding in verify(shards, swapped).computed] == ["computation"]


def _said(tmp_path: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    source, shards = made(tmp_path, Spec(config=config), Cut(2))
    return shards, source


def test_an_activation_that_is_not_known_is_a_warning(tmp_path: Path) -> None:
    """The bytes are compared all the same."""
    shards, source = _said(tmp_path, {"hidden_act": "situ"})
    done = reshard("verify", shards, "--source", source)
    assert done.code == 0, done.err
    line = "layers 0-1: not computed: its activation is situ, whose formula is not known here"
    assert line in done.err
    assert done.err.count("situ") == 1, "by the source and by the computation: once"
    assert "source: every byte matches" in done.out
    assert "computation: not made" in done.out
    document = reshard("verify", shards, "--source", source, "--format", "json").document
    assert (document["ok"], document["layers"], document["findings"]) == (True, [], [])
    assert [(note["check"], note["where"]) for note in document["notes"]] == [("computation", "layers 0-1")]


def test_without_a_config_it_is_a_warning_too(tmp_path: Path) -> None:
    source = checkpoint_of(CASES["gelu"].mlp(HIDDEN, INTERMEDIATE), tmp_path / "model", None)
    shards = split(source, tmp_path / "shards", Cut(2))
    done = reshard("verify", shards, "--source", source)
    assert done.code == 0, done.err
    assert (
        "layer 0: not computed: its activation is not known: there is no config.json; put the model's beside"
        in done.err
    )
    assert done.err.count("not computed") == 1


@pytest.mark.parametrize(("config", "other"), [({"hidden_act": "gelu"}, "silu"), ({"hidden_act": "situ"}, "silu")])
def test_the_manifests_must_be_the_sources(tmp_path: Path, config: dict[str, Any], other: str) -> None:
    shards, source = _said(tmp_path, config)

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][1]["activation"] = {"name": other, "limit": None}

    edit_manifest(shards, change)
    done = reshard("verify", shards, "--source", source)
    assert done.code == 3
    said = f"model: model.layers.1.mlp: manifest.json says that its activation is {other}, the source makes it "
    assert said + config["hidden_act"] in done.out


def test_a_source_whose_config_changed(tmp_path: Path) -> None:
    """The limit in config.json is another since the set was cut."""
    mlp, case = CASES["silu"].mlp(HIDDEN, INTERMEDIATE), CASES["silu with a limit"]
    source = checkpoint_of(mlp, tmp_path / "model", case.config | {"swiglu_limit": 7.0})
    shards = split(source, tmp_path / "shards", Cut(2))
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"swiglu_limit": 10.0}))
    done = reshard("verify", shards, "--source", source)
    assert done.code == 3
    assert "its activation is silu with limit 7, the source makes it silu with limit 10" in done.out
