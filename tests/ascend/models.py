"""Whole models around the dense layers of checkpoints, real ones and those of `tests.support.builders`."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reshard.plan.pipeline import Cut
from tests.ascend.inside import Served
from tests.support.builders import (
    CHECKPOINTS,
    Raw,
    Spec,
    build,
    dense_only,
    read_folder,
    read_safetensors,
    write_safetensors,
)
from tests.support.conversions import reference
from tests.support.running import split, split_parts
from tests.vllm.models import VOCABULARY, poisoned, write_model

_PLAIN = ["lm_head", "re:.*self_attn.*", "re:.*mlp[.]gate$", "re:.*experts.*"]

# What no real file at hand has: a recipe of tests.support.builders for gate and up, and one for down.
MADE = {
    "static v1": ("modelslim_static", None),
    "static FP16": ("modelslim_fp16_static", None),
    "mix": ("modelslim_mix", None),
    "dynamic, down plain": ("modelslim_dynamic", "modelslim_float"),
}


@dataclass(frozen=True)
class Model:
    """A model and the set cut from it for 2; `rest` is the model without what the set holds."""

    whole: Path
    rest: Path
    shards: Path
    dtype: str

    def both(self, **layout: Any) -> tuple[Served, Served]:
        """By the engine's own loader, and by ours."""
        own = Served(self.whole, dtype=self.dtype, **layout)
        return own, Served(self.rest, self.shards, dtype=self.dtype, **layout)


def made_of(name: str, folder: Path) -> Model:
    """A checkpoint that lies in the repository, one of `MADE`, or a recipe of `tests.support.builders`, in `folder`."""
    source = CHECKPOINTS / name
    if not source.exists():
        gate_up, down = MADE.get(name, (name, None))
        source = folder / "source"
        build(source, Spec(gate_up, down_recipe=down, computable=True))
    whole = around(source, folder / "model")
    split(whole, folder / "tp2", Cut(2))
    dtype = "float16" if "FP16" in name else "bfloat16"
    return Model(whole, poisoned(whole, folder / "rest"), folder / "tp2", dtype)


def with_parts(name: str, folder: Path, sizes: dict[str, int]) -> Model:
    """A real checkpoint's quantization in the dense layers and in o_proj; `shards` has a set of each part."""
    whole = around(CHECKPOINTS / name, folder / "model", o_proj=True)
    shards = split_parts(whole, folder / "parts", **sizes)
    return Model(whole, poisoned(whole, folder / "rest", sizes), shards, "bfloat16")


def with_w8a8_o_proj(model: Path, folder: Path) -> Path:
    """A copy of a BF16 model whose o_proj is what `--weights w8a8` must make of it, and is said to be."""
    tensors = read_folder(model)
    o_proj = {name: raw for name, raw in tensors.items() if ".o_proj." in name}
    converted = reference(o_proj, "w8a8", "modelslim")
    rest = {name: raw for name, raw in tensors.items() if name not in o_proj}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", rest | converted)
    said = dict.fromkeys(rest, "FLOAT") | dict.fromkeys(converted, "W8A8_DYNAMIC")
    (folder / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC"} | said))
    shutil.copy(model / "config.json", folder)
    return folder


def around(checkpoint: Path, folder: Path, *, o_proj: bool = False) -> Path:
    """A model with the dense layers of `checkpoint`: their tensors, in files of their names, and what config.json and
    the description say of their quantization. Everything else is random BF16, and said not to be quantized.

    o_proj: it is quantized, too, as down is, which has its shape; the vocabulary is no multiple of 64 then.
    """
    theirs = json.loads((checkpoint / "config.json").read_text())
    dense = theirs["first_k_dense_replace"]
    write_model(folder, layers=dense + 1, dense=dense, dtype="bfloat16", vocabulary=500 if o_proj else VOCABULARY)
    ours = json.loads((folder / "config.json").read_text())
    written = read_folder(folder)
    rest = {name: tensor for name, tensor in written.items() if name not in dense_only(written)}
    for path in folder.glob("model*"):
        path.unlink()
    copies = _copies_of_down(checkpoint, dense) if o_proj else {}
    rest = {name: value for name, value in rest.items() if not (copies and ".o_proj." in name)}
    attention = read_folder(checkpoint)
    rest |= {copy: _reversed(attention[name]) for copy, name in copies.items()}
    for number, path in enumerate(sorted(checkpoint.glob("*.safetensors"))):
        if tensors := dense_only(read_safetensors(path)):
            write_safetensors(folder / f"dense{number}.safetensors", tensors)
    write_safetensors(folder / "rest.safetensors", rest)
    for path in checkpoint.glob("quant_model_description*.json"):
        types = json.loads(path.read_text())
        of_tensors = {name for name in types if name.startswith("model.")} - dense_only(types).keys()
        described = {name: kind for name, kind in types.items() if name not in of_tensors}
        described |= dict.fromkeys(rest, "FLOAT") | {copy: types[name] for copy, name in copies.items()}
        (folder / path.name).write_text(json.dumps(described))
    for key in ("quantize", "mla_quantize", "quantization_config"):
        if key in theirs:
            ours[key] = theirs[key]
    if "ignore" in ours.get("quantization_config", {}):
        ours["quantization_config"]["ignore"] = _PLAIN
    (folder / "config.json").write_text(json.dumps(ours))
    return folder


def _copies_of_down(checkpoint: Path, dense: int) -> dict[str, str]:
    """Names of o_proj's tensors in every layer, each with one of a dense layer's down_proj."""
    return {
        f"model.layers.{layer}.self_attn.o_proj.{parts[-1]}": name
        for layer in range(dense + 1)
        for name in read_folder(checkpoint)
        if (parts := name.split("."))[1:5] == ["layers", str(layer % dense), "mlp", "down_proj"]
    }


def _reversed(tensor: Raw) -> Raw:
    """Its bytes the other way round, where any are values: no copy is taken for what it was made of."""
    dtype, shape, data = tensor
    return dtype, shape, data[::-1] if dtype in ("I8", "I32") else data


def same(own: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> None:
    """Every byte of every tensor."""
    assert own.keys() == ours.keys()
    for name, value in own.items():
        assert (value.dtype, value.shape) == (ours[name].dtype, ours[name].shape), name
        assert torch.equal(_bytes(value), _bytes(ours[name])), name


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """BF16 sums of 512 products, in another order and rounded once more. With a wrong shard all of it is wrong."""
    assert got.shape == wanted.shape
    if len(wanted):
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
