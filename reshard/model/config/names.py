"""What tensors' names say of layers: which are dense, against config.json, and which are MTP layers."""

from collections.abc import Collection, Iterable

from reshard.errors import LayersError
from reshard.model.config.read import ModelConfig
from reshard.model.naming import CONFIG, numbers

_MTP = frozenset({"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"})
"""What the MTP layers of DeepSeek, GLM, Step and openPangu have beside attention and MLP, and no other layer has."""


def is_mtp_layer(names: Iterable[str]) -> bool:
    """Whether a layer is an MTP layer, by the names in it: what follows `layers.{i}.`, such as `eh_proj.weight`."""
    return any(name.partition(".")[0] in _MTP for name in names)


def agree_on_dense(named: Collection[int], model: ModelConfig) -> tuple[str, ...]:
    """Warnings where the names decide. Raises LayersError where a key of config.json that is known says otherwise."""
    dense = frozenset(named)
    beyond = {layer for layer in dense if layer >= model.num_hidden_layers}
    if beyond:
        raise LayersError(
            f"{CONFIG}: num_hidden_layers is {model.num_hidden_layers}, and the names have dense layers "
            f"{numbers(dense)}: {numbers(beyond)} is behind the last; is {CONFIG} of this checkpoint? (An MTP layer is "
            "counted by num_nextn_predict_layers.)"
        )
    alone = f"the dense layers ({numbers(dense)}) are taken from names alone"
    if model.dense_layers is None:
        return (f"{CONFIG}: {model.reason}: {alone}",)
    if dense == model.dense_layers:
        return ()
    for other in model.other_accounts:
        if dense == other.layers:
            return (f"{CONFIG} contradicts itself: {model.reason}, but {other.reason}, as the names say",)
    if not model.is_stated:
        return (f"{CONFIG} ({model.reason}) gives {numbers(model.dense_layers)}: {alone}",)
    raise LayersError(
        f"{CONFIG} and the tensors' names disagree on the dense layers: {CONFIG} ({model.reason}) gives "
        f"{numbers(model.dense_layers)}, the names give {numbers(dense)} "
        f"(only in {CONFIG}: {numbers(model.dense_layers - dense)}; only in the names: "
        f"{numbers(dense - model.dense_layers)}); is {CONFIG} of this checkpoint?"
    )
