"""Hugging Face transformers models with split dense layers.

`attach` replaces the dense layers of a model that is there; `load_model` loads one without ever reading or holding
their full weights. Shapes: H hidden_size, I intermediate_size.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reshard.errors import MissingDependencyError, ShardError
from reshard.limits import JSON_BYTES
from reshard.manifest import Manifest
from reshard.model.naming import CONFIG
from reshard.model.parts import DENSE_FFN
from reshard.regular import is_there, read_whole, unreadable
from reshard.source.weights import INDEX_ENDING, SINGLE, TRANSFORMERS_KEY
from reshard.strict_json import parse_object
from reshard_runtime.ffn import DenseFFN
from reshard_runtime.group import agreement
from reshard_runtime.kernels import device_of
from reshard_runtime.loader import load_shard, one_set
from reshard_runtime.probe import disagreement
from reshard_runtime.serving.decoder import Decoder, Slot, decoder_of
from reshard_runtime.shard import Shard


def attach(
    model: nn.Module,
    shards: str | Path | Shard,
    group: torch.distributed.ProcessGroup | None = None,
    **options: Any,
) -> nn.Module:
    """Replace `mlp` of exactly the dense layers by `DenseFFN`s, and let the full weights go. Returns the model.

    Every rank calls it, with its own copy of the model, on the device where that is. `shards` is the folder, or what
    `load_shard` gave. `options` are `DenseFFN`'s. With tokens="scattered", its default, the ranks run the model in
    lockstep, each with its own tokens, as many on each, or up to `max_tokens`.

    A dense layer is one of the language model's (`get_decoder`) whose `mlp` has gate_proj and up_proj, or both as
    gate_up_proj, and down_proj of its own and no experts. What stands beside the language model is left as it is.

    Raises ShardError, on all ranks and with the model as it was, where its dense layers or sizes are not the shards',
    or what its MLPs compute between their matrices: that is asked of their own code, with a few values.
    """

    def load(device: torch.device) -> Shard:
        if isinstance(shards, Shard):
            return replace(shards, layers=dict(shards.layers))
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        return load_shard(shards, rank, device, tp_size=size)

    return _attach(model, load, group, options)


def _attach(
    model: nn.Module,
    load: Callable[[torch.device], Shard],
    group: torch.distributed.ProcessGroup | None,
    options: dict[str, Any],
) -> nn.Module:
    """`attach`, which takes the layers out of what `load` gives: only one at a time is held twice."""
    with agreement(group):
        decoder = decoder_of(model)
        weight = next(decoder.module.parameters())
        shard = load(weight.device)
        _compare(model, decoder, shard)
    options = {"dtype": weight.dtype} | options
    made = {index: DenseFFN(shard.layers.pop(index), group, **options) for index in list(shard.layers)}
    for index, ffn in made.items():
        decoder.layers[index].mlp = ffn
    return model


def load_model(
    path: str | Path,
    shards: str | Path,
    group: torch.distributed.ProcessGroup | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """The model in `path`, its dense layers from `shards`: their full weights are never in memory.

    It is of the class that transformers has for image and text, where it has one for the model's config, else the
    causal language model.

    Everything else is loaded by transformers' own `from_pretrained`. Raises as `attach` does.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    with agreement(group), one_set(Path(shards)) as stored:
        model = _load(path, dtype, stored.manifest).to(device_of(device)).eval()
        shard = load_shard(shards, rank, device, tp_size=size)
    return _attach(model, lambda _: shard, group, options)


def _check_taken(folder: Path, manifest: Manifest, told: str | None) -> None:
    """Of two accounts of the weights in a folder transformers takes one: the shards must be of it, too.

    told: config.json's TRANSFORMERS_KEY; without it, it is the single file.
    """
    cut_from = {file.name for file in manifest.source.files}
    taken = told or SINGLE
    if taken in cut_from or not all(is_there(folder / name) for name in (taken, *cut_from)):
        return
    if taken.endswith(INDEX_ENDING):
        try:
            raw = read_whole(folder / taken, JSON_BYTES)
        except OSError as error:
            raise ShardError(unreadable(folder / taken, error)) from error
        weight_map = parse_object(raw, taken).get("weight_map")
        if isinstance(weight_map, dict) and cut_from <= {file for file in weight_map.values() if isinstance(file, str)}:
            return
    other = f"take {TRANSFORMERS_KEY} out of {CONFIG}" if told else "move that file to another folder"
    raise ShardError(
        f"{folder}: transformers takes {taken}, the shards were cut from {', '.join(sorted(cut_from))}: attention "
        "would be of one account of the weights, the dense layers of the other; cut the shards with "
        f"--index {taken}, or {other}"
    )


def _load(path: str | Path, dtype: torch.dtype | None, manifest: Manifest) -> Any:
    """The model with slots for its dense layers: as image-text-to-text where transformers has that for its config."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("the model", "transformers", error) from error
    config = transformers.AutoConfig.from_pretrained(path)
    _check_taken(Path(path), manifest, getattr(config, TRANSFORMERS_KEY, None))
    kinds = (transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    base: Any = next((known[type(config)] for known in kinds if type(config) in known), None)
    if base is None:
        raise ShardError(
            f"{path}: transformers has no causal language model for {type(config).__name__}, nor an image-text-to-text "
            "one; load the model by its own class and attach the shards"
        )
    model = _without_dense(base, manifest.model.prefix).from_pretrained(path, dtype=dtype or "auto")
    model.__class__ = base  # the derived class was only for the build: it cannot be pickled, nor made again
    return model


def _without_dense(base: Any, prefix: str) -> Any:
    """The model class with slots for its dense layers; its checkpoint's tensors for them are passed over by name.

    transformers has renamed them as the model's own by then, or, a prefix that is added, has not.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        decoder = decoder_of(self)
        dense = decoder.dense()
        for index, found in dense.items():
            decoder.layers[index].mlp = Slot(found)
        layers = "|".join(re.escape(name) for name in (f"{decoder.name}.", f"{prefix}layers."))
        roles = "|".join(DENSE_FFN.names())
        passed = [rf"^(?:{layers}){index}\.mlp\.(?:{roles})\..+" for index in dense]
        self._keys_to_ignore_on_load_unexpected = {*(base._keys_to_ignore_on_load_unexpected or ()), *passed}

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def _compare(model: nn.Module, decoder: Decoder, shard: Shard) -> None:
    dense = decoder.dense()
    if list(dense) != list(shard.layers):
        other = decoder.named_otherwise()
        raise ShardError(
            f"{shard.file}: its dense layers are {list(shard.layers)}, {type(model).__name__}'s are {list(dense)}"
            + ("" if other is None else f"; {other} is none of them: only what a layer calls `mlp` is replaced")
        )
    wanted = shard.sizes
    for index, found in dense.items():
        name = decoder.module_name(index)
        if found.sizes != wanted:
            raise ShardError(f"{shard.file}: {' and '.join(DENSE_FFN.sizes)} are {wanted}, {name}'s are {found.sizes}")
        activation = shard.layer(index).known_activation()
        difference = disagreement(found.answers, activation, torch.float32)
        if difference is not None:
            raise ShardError(
                f"{shard.file}: layer {index}'s activation is {activation}, {name} computes another: {difference}; cut "
                "the set from this model's checkpoint, with its config.json"
            )
