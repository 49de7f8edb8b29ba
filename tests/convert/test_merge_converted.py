"""Merging sets of one checkpoint of which some were converted: what the files beside the merged weights say of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reshard.convert.together import common_files
from reshard.errors import SourceError
from reshard.model.parts import PARTS
from reshard.plan.pipeline import Cut
from reshard.source.open import describe, open_source
from tests.support.builders import Raw, read_folder
from tests.support.conversions import reference
from tests.support.part_models import Model, build
from tests.support.running import reshard, split
from tests.support.sets import no_fsync, snapshot  # noqa: F401

pytest.importorskip("torch")

O_PROJ = [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
DENSE = [f"model.layers.0.mlp.{role}_proj" for role in ("gate", "up", "down")]
TABLES = ["lm_head", "model.embed_tokens"]

KEEP, BF16, SLIM, COMPRESSED = (
    ("keep", "modelslim"),
    ("bf16", "modelslim"),
    ("w8a8", "modelslim"),
    ("w8a8", "compressed-tensors"),
)
"""What `--weights` and `--quant-format` make of a set."""

Cuts = dict[str, tuple[str, str]]


def cut(folder: Path, model: Model, cuts: Cuts) -> dict[str, Raw]:
    """The sets of a new checkpoint; what they hold, put together."""
    tensors = build(folder / "model", model)
    held: dict[str, Raw] = {}
    for key, (weights, form) in cuts.items():
        cut_as = Cut(2, weights=weights, quant_format=form, part=PARTS[key])
        split(folder / "model", folder / "sets" / key, cut_as)
        own = model.of(key, tensors)
        stays = weights == "keep" or not PARTS[key].quantized  # the tables are BF16
        held |= own if stays else reference(own, weights, form)
    return held


def compressed(*targets: str, floats: list[str], kind: str = "int") -> dict[str, Any]:
    """The keys that matter of compressed-tensors' section."""
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "targets": [*targets],
        "ignore": floats,
    }


def said(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a config says of the quantization, in the form of `compressed` where that says it."""
    section: dict[str, Any] | None = config.get("quantization_config")
    if section is None or "config_groups" not in section:
        return section
    (group,) = section["config_groups"].values()
    return {key: section[key] for key in ("quant_method", "format", "ignore")} | {"targets": group["targets"]}


def types(*quantized: str, floats: list[str]) -> dict[str, str]:
    """ModelSlim's description."""
    suffixes = ("weight", "weight_scale", "weight_offset")
    named = {f"{module}.{suffix}": "W8A8_DYNAMIC" for module in quantized for suffix in suffixes}
    return {
        "version": "1.0.0",
        "model_quant_type": "W8A8_DYNAMIC",
        **named,
        **{f"{one}.weight": "FLOAT" for one in floats},
    }


FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT8 = {"activation_scheme": "dynamic", "quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
_OF_DENSE = r"re:(model\.layers\.0\.mlp)\.(gate_proj|up_proj|down_proj)$"
_OF_O_PROJ = r"re:(model\.layers\.0\.self_attn|model\.layers\.1\.self_attn)\.(o_proj)$"
_REST: Cuts = {"lm_head": KEEP, "embedding": KEEP}

Case = tuple[str, Cuts, dict[str, Any] | None, dict[str, str] | None]
"""The checkpoint's recipe, how its sets are cut; what config.json and ModelSlim's description must say."""

MERGED: dict[str, Case] = {
    "w8a8 and tables that stay": (
        "fp8_block",
        {"o_proj": SLIM, "lm_head": SLIM, "embedding": SLIM},
        None,
        types(*O_PROJ, floats=TABLES),
    ),
    "w8a8 of bf16": ("bf16", {"o_proj": SLIM, **_REST}, None, types(*O_PROJ, floats=TABLES)),
    "w8a8 beside bf16": ("bf16", {"denseffn": SLIM, "o_proj": KEEP}, None, types(*DENSE, floats=O_PROJ)),
    "w8a8 of two": ("fp8_block", {"denseffn": SLIM, "o_proj": SLIM}, None, types(*DENSE, *O_PROJ, floats=[])),
    "compressed": ("fp8_block", {"o_proj": COMPRESSED, **_REST}, compressed(_OF_O_PROJ, floats=TABLES), None),
    "compressed of two": (
        "fp8_block",
        {"denseffn": COMPRESSED, "o_proj": COMPRESSED},
        compressed(_OF_DENSE, _OF_O_PROJ, floats=[]),
        None,
    ),
    "bf16 and tables that stay": ("fp8_block", {"denseffn": BF16, "o_proj": BF16, **_REST}, None, None),
    "fp8 beside bf16": (
        "fp8_block",
        {"denseffn": KEEP, "lm_head": KEEP, "o_proj": BF16},
        FP8 | {"modules_to_not_convert": ["lm_head", *O_PROJ]},
        None,
    ),
    "int8 blocks beside bf16": (
        "int8_block",
        {"denseffn": BF16, "o_proj": KEEP},
        INT8 | {"modules_to_not_convert": DENSE},
        None,
    ),
    "compressed fp8 beside bf16": (
        "ct_fp8_block",
        {"denseffn": KEEP, "o_proj": BF16},
        compressed(_OF_DENSE, floats=O_PROJ, kind="float"),
        None,
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_and_cut_again(tmp_path: Path, name: str) -> None:
    recipe, cuts, section, description = MERGED[name]
    held = cut(tmp_path, Model(recipe, hidden=256), cuts)
    done = reshard("merge", tmp_path / "sets", tmp_path / "merged", "--quiet")
    assert done.code == 0, done.err
    assert read_folder(tmp_path / "merged") == held
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert said(config) == section
    rest = json.loads((tmp_path / "model/config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == {
        key: value for key, value in rest.items() if key != "quantization_config"
    }
    beside = tmp_path / "merged/quant_model_description.json"
    assert (json.loads(beside.read_text()) if beside.exists() else None) == description
    for key in cuts:
        seen = reshard("inspect", tmp_path / "merged", "--part", key, "--format", "json")
        assert (seen.code, seen.err) == (0, "")
        assert seen.document["scheme"] == json.loads((tmp_path / "sets" / key / "manifest.json").read_text())["scheme"]
        split(tmp_path / "merged", tmp_path / "again" / key, Cut(2, part=PARTS[key]))
        again, before = (snapshot(tmp_path / where / key) for where in ("again", "sets"))
        shards = [file for file in before if file.endswith(".safetensors")]
        assert len(shards) == 2
        assert all(again[file] == before[file] for file in shards)


@pytest.mark.parametrize(
    ("model", "cuts", "line"),
    [
        (
            Model("fp8_block", hidden=256),
            {"denseffn": KEEP, "lm_head": KEEP, "o_proj": SLIM},
            "denseffn holds fp8-block and o_proj W8A8_DYNAMIC: no tool's files say both of one checkpoint; convert "
            "both alike (split --weights), or merge each by itself",
        ),
        (
            Model("bf16"),
            {"denseffn": COMPRESSED, "o_proj": SLIM},
            "denseffn holds int8-channel-dynamic and o_proj W8A8_DYNAMIC: no tool's files say both",
        ),
        (
            Model("fp8_block", hidden=256, config={"torch_dtype": "float16"}),
            {"lm_head": KEEP, "o_proj": BF16},
            "config.json of lm_head and of o_proj differ in torch_dtype: 'float16' and 'bfloat16'; merge each by "
            "itself",
        ),
    ],
)
def test_what_no_files_can_say_is_refused(tmp_path: Path, model: Model, cuts: Cuts, line: str) -> None:
    cut(tmp_path, model, cuts)
    done = reshard("merge", tmp_path / "sets", tmp_path / "merged", "--quiet")
    assert done.code == 1
    assert done.err.startswith(f"error: {line}")
    assert not (tmp_path / "merged").exists()


def test_what_would_be_read_as_something_else_is_refused(tmp_path: Path) -> None:
    """Sections are written for blocks of 128 x 128: of others they say what is not so."""
    cut(tmp_path, Model("fp8_block", hidden=256), {"denseffn": KEEP, "o_proj": BF16})
    held = []
    for key in ("denseffn", "o_proj"):
        with open_source(str(tmp_path / "sets" / key)) as source:
            held.append((key, describe(source)))
    assert "config.json" in common_files(held)
    (_, dense), other = held
    (layer,) = dense.layers
    of_64 = {role: replace(linear, block=(64, 64)) for role, linear in layer.linears.items()}
    dense = replace(dense, layers=(replace(layer, linears=of_64),))
    says = "denseffn: with what the sets have in common in config.json it would be read as something else; merge each"
    with pytest.raises(SourceError, match=says):
        common_files([("denseffn", dense), other])


@pytest.mark.parametrize("weights", ["keep", "w8a8"])
def test_two_configs_of_one_model_are_two_checkpoints(tmp_path: Path, weights: str) -> None:
    """Neither the identity of a set nor its tensors tell them apart."""
    build(tmp_path / "model", Model("bf16"))
    split(tmp_path / "model", tmp_path / "sets/lm_head", Cut(2, part=PARTS["lm_head"]))
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 1}))
    split(tmp_path / "model", tmp_path / "sets/o_proj", Cut(2, weights=weights, part=PARTS["o_proj"]))
    done = reshard("merge", tmp_path / "sets", tmp_path / "merged", "--quiet")
    assert done.code == 1
    assert done.err.removeprefix("error: ").startswith(
        "config.json of lm_head and of o_proj differ: the sets are of two checkpoints; merge each by itself"
        if weights == "keep"
        else "config.json of lm_head and of o_proj differ in rope_theta: None and 1; merge each by itself"
    )
