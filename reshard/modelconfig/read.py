"""What the cut needs of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reshard.activation import Activation
from reshard.errors import LayersError, SourceError
from reshard.modelconfig.layers import dense_layers
from reshard.modelconfig.values import number
from reshard.modelconfig.wrapper import language_config
from reshard.naming import CONFIG

_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """The language model's own: sizes, dense layers, what those compute.

    dense_layers: None where no key that is known says them, and the tensors' names decide. reason: the keys that make
    the layers dense, or why none does. wrapper: the key under which the language model's config is nested.
    activations: of each layer; None where config.json does not say it and the family's default is not known.
    warnings: what was not understood, a line each.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    prediction_layers: int
    dense_layers: frozenset[int] | None
    reason: str
    wrapper: str | None = None
    activations: tuple[Activation | None, ...] = ()
    warnings: tuple[str, ...] = ()

    def activation(self, layer: int) -> Activation | None:
        """What stands between a dense layer's matrices; None where that is not known."""
        return self.activations[layer] if layer < len(self.activations) else None


def read_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """config: the whole of config.json. Raises SourceError naming the key that is missing or makes no sense."""
    wrapper, language = language_config(config)
    layers = number(language, "num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise SourceError(f"{CONFIG}: num_hidden_layers is {layers}, up to {_MAX_LAYERS} are believed")
    dense, reason = dense_layers(language, layers)
    model_type = language.get("model_type", config.get("model_type"))
    activation = language.get("hidden_act")
    return ModelConfig(
        model_type=model_type if isinstance(model_type, str) else "",
        hidden_size=number(language, "hidden_size"),
        intermediate_size=number(language, "intermediate_size"),
        num_hidden_layers=layers,
        prediction_layers=number(language, "num_nextn_predict_layers", default=0),
        dense_layers=dense,
        reason=reason,
        wrapper=wrapper,
        activations=(Activation(activation) if isinstance(activation, str) else None,) * layers,
    )


def known_dense_layers(model: ModelConfig) -> frozenset[int]:
    """The dense layers by the config alone. Raises LayersError where it takes the tensors' names to say them."""
    if model.dense_layers is None:
        raise LayersError(
            f"{CONFIG}: {model.reason}: which layers are dense is not known without the tensors' names; give the "
            "checkpoint, its headers are enough"
        )
    return model.dense_layers
