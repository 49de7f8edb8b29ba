"""The dense layers of a transformers model, by its own structure: never by part of a name.

Shapes: H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reshard.errors import ShardError
from reshard.model.parts import DOWN, GATE, GATE_UP, UP
from reshard_runtime.ffn import DenseFFN
from reshard_runtime.probe import answers, without_linears

_FORMS = ((GATE, UP, DOWN), (GATE_UP, DOWN))
"""The linears of a dense MLP, gate and up apart or stacked (Phi-3, GLM-4)."""


@dataclass(frozen=True)
class Dense:
    """A dense layer of the model: its sizes [H, I], and what its MLP answers between its matrices."""

    sizes: tuple[int, int]
    answers: torch.Tensor


class Slot(nn.Module):
    """Where a dense layer's weights would be."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.dense = dense


@dataclass(frozen=True)
class Decoder:
    """A language model, maybe within a wrapper. name: of its list of layers there, "model.language_model.layers"."""

    name: str
    module: Any
    layers: nn.ModuleList

    def module_name(self, index: int) -> str:
        """The name of a layer's MLP in the model."""
        return f"{self.name}.{index}.mlp"

    def dense(self) -> dict[int, Dense]:
        """The dense layers, by index: those whose `mlp` has gate, up and down of its own and no experts.

        Raises ShardError for one that is split already, that has more than these, or whose forward is another.
        """
        found: dict[int, Dense] = {}
        for index, layer in enumerate(self.layers):
            mlp, name = getattr(layer, "mlp", None), self.module_name(index)
            if isinstance(mlp, Slot):
                found[index] = mlp.dense
            elif isinstance(mlp, DenseFFN):
                raise ShardError(f"{name} is split already")
            elif isinstance(mlp, nn.Module) and (linears := _linears(mlp)) is not None:
                found[index] = Dense(_sizes(name, mlp, linears), _answers(name, mlp, linears))
        return found

    def named_otherwise(self) -> str | None:
        """The first dense MLP that its layer does not call `mlp`, None without one."""
        for index, layer in enumerate(self.layers):
            for name, child in layer.named_children():
                if name != "mlp" and _linears(child) is not None:
                    return f"{self.name}.{index}.{name}"
        return None


def decoder_of(model: nn.Module) -> Decoder:
    """The language model in a causal one or a wrapper, as transformers tells it: `get_decoder`.

    Of a module without that, `model.layers` or `layers`. Raises ShardError where there is no list of layers.
    """
    decoder: Any = model
    if not hasattr(model, "get_decoder"):
        for name, module in (("model.layers", getattr(model, "model", None)), ("layers", model)):
            layers = getattr(module, "layers", None)
            if isinstance(layers, nn.ModuleList):
                return Decoder(name, module, layers)
        raise ShardError(
            f"{type(model).__name__} is no model of transformers: it has no get_decoder(), nor a list `model.layers`"
        )
    while (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    for module in decoder.modules():  # Llama 4's is one further in
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and type(getattr(module, "config", None)) is type(decoder.config):
            name = next(name for name, each in model.named_modules() if each is layers)
            return Decoder(name, module, layers)
    raise ShardError(
        f"{type(model).__name__}: its get_decoder() leads to {type(decoder).__name__}, which has no list `layers`, so "
        "that its dense layers cannot be found; give the language model within it"
    )


class _Half(nn.Module):
    """In the place of gate_proj or up_proj: the left or right half of what it is given."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self._half = half

    def forward(self, h_T2L: torch.Tensor) -> torch.Tensor:
        """[T, L]."""
        return h_T2L.chunk(2, dim=-1)[self._half]


_STAND_INS = {GATE: _Half(0), UP: _Half(1), GATE_UP: nn.Identity(), DOWN: nn.Identity()}


def _linears(mlp: nn.Module) -> Mapping[str, nn.Linear] | None:
    """The linears of a dense MLP; None of any other module."""
    own = dict(mlp.named_children())
    if "experts" in own:
        return None
    for form in _FORMS:
        found = {role: linear for role in form if isinstance(linear := own.get(role), nn.Linear)}
        if len(found) == len(form):
            return found
    return None


def _sizes(name: str, mlp: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[int, int]:
    """[H, I]. What stands beside a linear's weight because it is quantized may be of another form in the shards."""
    for key in mlp.state_dict():
        module, _, suffix = key.rpartition(".")
        if module not in linears or suffix == "bias":
            raise ShardError(f"{name} has {key}; shards have none, it would be lost")
    down = linears[DOWN]
    rows = sum(linear.out_features for role, linear in linears.items() if role != DOWN)
    if rows != 2 * down.in_features:
        raise ShardError(f"{name}: gate and up have {rows} rows in all, down has {down.in_features} columns")
    return down.out_features, down.in_features


def _answers(name: str, mlp: nn.Module, linears: Mapping[str, nn.Linear]) -> torch.Tensor:
    try:
        return answers(without_linears(mlp, {role: _STAND_INS[role] for role in linears}), torch.float32)
    except Exception as error:  # a forward that does more than that may raise anything
        raise ShardError(
            f"{name}: {type(mlp).__name__} does not run without its weights, so that what it computes between them "
            f"cannot be compared with the shards' activation: {error}"
        ) from error
