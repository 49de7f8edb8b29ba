"""Which of the modules in a checkpoint is the language model: what precedes its layers' names."""

from collections.abc import Iterable, Mapping
from typing import Any

from reshard.checkpoint import Tensor
from reshard.errors import LayersError
from reshard.foreign import what_is_there
from reshard.modelconfig import ModelConfig
from reshard.naming import CONFIG, DOWN, PREFIX, DenseName, mlp_name, parse_dense

_PUBLISHED = {
    "deepseek_vl_v2": "language.model.",
    "glm4v": "model.language_model.",
    "glm4v_moe": "model.language_model.",
    "kimi_k25": "language_model.model.",
    "kimi_k3": "language_model.model.",
    "mistral3": "language_model.model.",
    "qwen3_5": "model.language_model.",
    "qwen3_5_moe": "model.language_model.",
}
"""What precedes the layers' names in the published checkpoints of wrappers, by the wrapper's model_type."""


def published_prefix(config: Mapping[str, Any]) -> str:
    """The prefix that a config.json promises, where there are no names to take it from."""
    model_type = config.get("model_type")
    return _PUBLISHED.get(model_type, PREFIX) if isinstance(model_type, str) else PREFIX


def language_prefix(tensors: Mapping[str, Tensor], other_names: Iterable[str], config: ModelConfig | None) -> str:
    """The prefix of the DenseFFN tensors' names. Where several modules have such tensors, config.json's sizes decide.

    Raises LayersError where there are none, or where more than one fits.
    """
    found: dict[str, list[tuple[DenseName, Tensor]]] = {}
    for name, tensor in tensors.items():
        parsed = parse_dense(name)
        if parsed is not None:
            found.setdefault(parsed.prefix, []).append((parsed, tensor))
    if not found:
        because = f" ({CONFIG}: {config.reason})" if config else ""
        raise LayersError(
            "no dense layer: no tensor is named …layers.{i}.mlp.{gate,up,down}_proj.weight"
            f"{because}{what_is_there(other_names)}"
        )
    if len(found) == 1:
        return next(iter(found))
    fitting = [prefix for prefix, members in found.items() if config is not None and _fits(members, config)]
    if len(fitting) == 1:
        return fitting[0]
    first, second, *_ = sorted(fitting or found)
    modules = [f"{mlp_name(prefix, found[prefix][0][0].layer)}.*" for prefix in (first, second)]
    sizes = f"both of {CONFIG}'s sizes" if fitting else f"{CONFIG} fits neither" if config else f"there is no {CONFIG}"
    raise LayersError(
        f"two modules have dense layers, {modules[0]} and {modules[1]}, and {sizes}: which is the language model "
        "cannot be told; give a checkpoint that holds one of them"
    )


def _fits(members: Iterable[tuple[DenseName, Tensor]], config: ModelConfig) -> bool:
    """Whether the down projections have the config's sizes."""
    wanted = (config.hidden_size, config.intermediate_size)
    shapes = {tensor.shape for name, tensor in members if name.role == DOWN and name.suffix == "weight"}
    return shapes == {wanted}
