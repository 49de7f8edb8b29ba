"""The dense layers of a transformers model, by its own structure: never by part of a name.

Shapes: H hidden_size, I intermediate_size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from reshard.errors import ShardError
from reshard.naming import DOWN, GATE, GATE_UP, UP

_FORMS = ((GATE, UP, DOWN), (GATE_UP, DOWN))
"""The linears of a dense MLP; Phi-3's and GLM-4's stack gate and up."""


@dataclass(frozen=True)
class Decoder:
    """A language model within a model. `layers` is called `name` there: "model.language_model.layers"."""

    name: str
    module: Any
    layers: nn.ModuleList

    def mlp_name(self, index: int) -> str:
        """The name of a layer's MLP in the model."""
        return f"{self.name}.{index}.mlp"

    def mlps(self) -> Iterator[tuple[int, nn.Module]]:
        """(index, `mlp`) of each layer that has one."""
        for index, layer in enumerate(self.layers):
            mlp = getattr(layer, "mlp", None)
            if isinstance(mlp, nn.Module):
                yield index, mlp

    def otherwise_named(self) -> str | None:
        """A dense MLP that its layer calls something else, None without one."""
        for index, layer in enumerate(self.layers):
            for name, child in layer.named_children():
                if name != "mlp" and linears_of(child) is not None:
                    return f"{self.name}.{index}.{name}"
        return None


def decoder_of(model: nn.Module) -> Decoder:
    """The language model of a causal one or of a wrapper, as transformers tells it: `get_decoder`.

    Raises ShardError where there is none, or its layers are not called `layers`.
    """
    decoder: Any = model
    while hasattr(decoder, "get_decoder") and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ShardError(
            f"{type(model).__name__}: get_decoder() gives {type(decoder).__name__}, which has no list of `layers`; "
            "give the language model within it"
        )
    return Decoder(next(name for name, module in model.named_modules() if module is layers), decoder, layers)


def linears_of(mlp: nn.Module) -> Mapping[str, nn.Linear] | None:
    """The linears of a dense MLP: gate and up [I, H], or both stacked [2I, H], and down [H, I]. None of any other."""
    own = dict(mlp.named_children())
    if "experts" in own:
        return None
    for form in _FORMS:
        found = {role: linear for role in form if isinstance(linear := own.get(role), nn.Linear)}
        if len(found) == len(form):
            return found
    return None


def sizes_of(name: str, mlp: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[int, int]:
    """(H, I) of a dense MLP. Raises ShardError for one that has more than its linears' weights: it would be lost.

    What stands beside a weight because it is quantised may be of another form in the shards.
    """
    for key in mlp.state_dict():
        module, _, suffix = key.rpartition(".")
        if module not in linears or suffix == "bias":
            raise ShardError(f"{name} has {key}, which shards do not hold; it would be lost")
    down = linears[DOWN]
    rows = sum(linear.out_features for role, linear in linears.items() if role != DOWN)
    if rows != 2 * down.in_features:
        raise ShardError(f"{name}: gate and up have {rows} rows, down has {down.in_features} columns: not the half")
    return down.out_features, down.in_features
