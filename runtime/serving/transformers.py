"""Hugging Face transformers models with split dense layers.

`attach` replaces the dense layers of a model that is there; `load_model` loads one without ever reading or holding
their full weights. Shapes: H hidden_size, I intermediate_size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reshard.errors import MissingDependencyError, ShardError
from runtime.ffn import DenseFFN
from runtime.group import agree
from runtime.kernels import device_of
from runtime.loader import load_shard
from runtime.probe import answers, disagreement, without_linears
from runtime.shard import LayerShard, Shard


@dataclass(frozen=True)
class _Dense:
    """A dense layer's MLP in the model: its name, its sizes [H, I], what it answers (runtime.probe) between them."""

    name: str
    sizes: tuple[int, int]
    answers: torch.Tensor


class _Slot(nn.Module):
    """Where a dense layer's weights would be."""

    def __init__(self, dense: _Dense) -> None:
        super().__init__()
        self.dense = dense


class _Half(nn.Module):
    """In the place of gate_proj or up_proj: the left or right half of what it is given."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self._half = half

    def forward(self, h_T2L: torch.Tensor) -> torch.Tensor:
        """[T, L]."""
        return h_T2L.chunk(2, dim=-1)[self._half]


_STAND_INS: tuple[Mapping[str, nn.Module], ...] = (
    {"gate_proj": _Half(0), "up_proj": _Half(1), "down_proj": nn.Identity()},
    {"gate_up_proj": nn.Identity(), "down_proj": nn.Identity()},
)
"""The linears of a dense MLP, apart or with gate and up stacked, and what stands for them when it is asked."""
_ROLES = sorted({role for each in _STAND_INS for role in each})


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

    A dense layer is one whose `mlp` has gate_proj, up_proj and down_proj of its own (or gate_up_proj) and no experts.

    Raises ShardError, on all ranks and with the model as it was, where its dense layers or sizes are not the shards',
    or what its MLPs compute between their matrices: that is asked of their own code, with a few values.
    """
    problem: Exception | None = None
    held: dict[int, LayerShard] = {}
    try:
        held = _held(model, shards, group)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    agree(group, {}, problem)
    own: dict[str, Any] = {"dtype": next(model.parameters()).dtype}
    made = {index: DenseFFN(layer, group, **(own | options)) for index, layer in held.items()}
    _, layers = _decoder_layers(model)
    for index, ffn in made.items():
        layers[index].mlp = ffn
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
    """The causal language model in `path`, beside vision or not, its dense layers from `shards`.

    Their full weights are never in memory. Everything else is loaded by transformers' own `from_pretrained`. Raises as
    `attach` does.
    """
    model: Any = None
    problem: Exception | None = None
    try:
        model = _load(path, dtype).to(device_of(device)).eval()
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    agree(group, {}, problem)
    return attach(model, shards, group, **options)


def _load(path: str | Path, dtype: torch.dtype | None) -> Any:
    """The model with slots for its dense layers."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(path)
    mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    known: Mapping[type, Any] | None = next((each for each in mappings if type(config) in each), None)
    if known is None:
        raise ShardError(f"{path}: transformers has no causal language model for {type(config).__name__}")
    base = known[type(config)]
    model = _without_dense(base).from_pretrained(path, dtype=dtype or "auto")
    model.__class__ = base
    return model


def _held(
    model: nn.Module, shards: str | Path | Shard, group: torch.distributed.ProcessGroup | None
) -> dict[int, LayerShard]:
    """The rank's part of each dense layer, compared with the model's."""
    dense = _dense(model)
    if not isinstance(shards, Shard):
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        shards = load_shard(shards, rank, next(model.parameters()).device, tp_size=size)
    _compare(model, dense, shards)
    return dict(shards.layers)


def _without_dense(base: Any) -> Any:
    """The model class with slots for its dense layers; its checkpoint's tensors for them are passed over by name."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _, layers = _decoder_layers(self)
        dense = _dense(self)
        for index, found in dense.items():
            layers[index].mlp = _Slot(found)
        passed = [rf"{re.escape(found.name)}\.({'|'.join(_ROLES)})\..+" for found in dense.values()]
        self._keys_to_ignore_on_load_unexpected = {*(base._keys_to_ignore_on_load_unexpected or ()), *passed}

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"transformers cannot be imported ({error}); pip install transformers") from error
    return transformers


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The language model's layers, and their name in the model: "model.language_model.layers" in some beside vision."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in (decoder, getattr(decoder, "model", None)):
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return next(name for name, each in model.named_modules() if each is layers), layers
    raise ShardError(f"{type(model).__name__} has no language model's layers; its dense layers cannot be found")


def _dense(model: nn.Module) -> dict[int, _Dense]:
    """The dense layers, by index."""
    found: dict[int, _Dense] = {}
    name, layers = _decoder_layers(model)
    for index, layer in enumerate(layers):
        module = f"{name}.{index}.mlp"
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, _Slot):
            found[index] = mlp.dense
        elif isinstance(mlp, DenseFFN):
            raise ShardError(f"{module} is split already")
        elif isinstance(mlp, nn.Module) and (stand_ins := _linears(mlp)):
            for role in stand_ins:
                if getattr(mlp, role).bias is not None:
                    raise ShardError(f"{module}.{role} has a bias; shards have none, it would be lost")
            found[index] = _Dense(module, tuple(mlp.down_proj.weight.shape), _answers(module, mlp, stand_ins))
    return found


def _answers(name: str, mlp: nn.Module, stand_ins: Mapping[str, nn.Module]) -> torch.Tensor:
    try:
        return answers(without_linears(mlp, stand_ins), torch.float32)
    except Exception as error:  # a forward that does more than that may raise anything
        raise ShardError(
            f"{name}: {type(mlp).__name__} does not run without its weights, so that what it "
            f"computes between them cannot be compared with the shards' activation: {error}"
        ) from error


def _linears(mlp: nn.Module) -> Mapping[str, nn.Module] | None:
    """Those of a dense layer's MLP; None for another module."""
    own = dict(mlp.named_children())
    if "experts" in own:
        return None
    return next((each for each in _STAND_INS if all(isinstance(own.get(role), nn.Linear) for role in each)), None)


def _compare(model: nn.Module, dense: Mapping[int, _Dense], shard: Shard) -> None:
    if list(dense) != list(shard.layers):
        raise ShardError(
            f"{shard.file}: its dense layers are {list(shard.layers)}, {type(model).__name__}'s are {list(dense)}"
        )
    wanted = (shard.hidden_size, shard.intermediate_size)
    for index, found in dense.items():
        if found.sizes != wanted:
            raise ShardError(
                f"{shard.file}: hidden_size and intermediate_size are {wanted}, {found.name}'s are {found.sizes}"
            )
        activation = shard.layer(index).known_activation()
        difference = disagreement(found.answers, activation, torch.float32)
        if difference is not None:
            raise ShardError(
                f"{shard.file}: layer {index}'s activation is {activation}, {found.name} computes another: "
                f"{difference}; cut the set from this model's checkpoint, with its config.json"
            )
