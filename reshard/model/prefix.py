"""Which of the modules in a checkpoint is the language model: what precedes its layers' names."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reshard.checkpoint.description import Tensor
from reshard.errors import LayersError
from reshard.model.config import ModelConfig, language_config
from reshard.model.config.values import word
from reshard.model.foreign import what_is_there
from reshard.model.naming import CONFIG, PREFIX, WRAPPED, layer_name, parse_layer, parse_tensor, stands_beside
from reshard.model.parts import DENSE_FFN, Part, Place
from reshard.tensors.dtypes import FLOATS

_PUBLISHED = {
    model_type: prefix
    for prefix, model_types in {
        "language.model.": "deepseek_vl_v2",
        "language_model.model.": "gemma3 internvl_chat kimi_k25 kimi_k3 kimi_vl llama4 llava mistral3",
        "model.language_model.": "glm4v glm4v_moe interns1 qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
        "thinker.model.": "qwen2_5_omni qwen3_omni_moe",
    }.items()
    for model_type in model_types.split()
}
"""What precedes the layers' names in the published checkpoints of wrappers, by the wrapper's model_type."""

_MLP_OR_NORM = re.compile(r"(?:mlp|\w*norm\w*)\.")
_EXPERTS = re.compile(r"(?:\w+\.)?experts\.")
_UNPACKED = FLOATS | {"F8_E4M3", "F8_E5M2"}
"""Types of weights whose shapes are those of config.json, however they are quantized."""


def published_prefix(config: Mapping[str, Any]) -> str:
    """The prefix that a config.json promises, where there are no names to take it from.

    Of a wrapper that is not known (`is_known_wrapper`) one that is asked for under every other, too.
    """
    unknown = PREFIX if language_config(config)[0] is None else WRAPPED[0]
    return _PUBLISHED.get(word(config, "model_type") or "", unknown)


def head_prefix(config: Mapping[str, Any]) -> str:
    """What precedes lm_head where the layers have the published prefix: what precedes `model.` in that.

    Of `language_model.model.` that is `language_model.`; where `model.` comes first, the head is at the top.
    """
    prefix = published_prefix(config)
    modules = prefix.removesuffix(".").split(".")
    above = modules[: modules.index("model")] if "model" in modules else modules
    return "".join(f"{module}." for module in above)


def is_known_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether it is known what precedes the layers' names; it is of a config that is no wrapper's."""
    return language_config(config)[0] is None or word(config, "model_type") in _PUBLISHED


@dataclass
class _Module:
    """What names say of a module that has layers. having: its layers that have tensors of the part.

    shapes: of the weights of the part's last linear. mixes: whether a layer has more than an MLP and norms: attention,
    by whatever name.
    """

    layers: set[int] = field(default_factory=set)
    having: set[int] = field(default_factory=set)
    mixes: bool = False
    has_experts: bool = False
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def add(self, layer: int, rest: str) -> None:
        self.layers.add(layer)
        self.mixes = self.mixes or _MLP_OR_NORM.match(rest) is None
        self.has_experts = self.has_experts or _EXPERTS.match(rest) is not None


def language_prefix(
    part: Part, tensors: Mapping[str, Tensor], other_names: Collection[str], config: ModelConfig | None
) -> str:
    """The prefix of the language model's layers, among all modules that have layers. part: one that layers have.

    Its weights that are not packed have config.json's sizes, it has the layers with the part that config.json names,
    attention and, where any has them, experts, and reaches the last layer. Raises LayersError where no module or more
    than one has whatever some have of these, and where the language model has nothing of the part.
    """
    modules = _modules(part, tensors, other_names)
    having = sorted(prefix for prefix, module in modules.items() if module.having)
    none = f"no {part.unit}"
    if not having:
        because = f" ({CONFIG}: {config.reason})" if config and part.place is Place.DENSE_LAYERS else ""
        beside = next((name for name in sorted(other_names) if _stands_beside(name, part)), None)
        there = f"; {beside} is another module's, by its name" if beside else _nearest(part, other_names)
        roles = ",".join(role.name.removesuffix("_proj") for role in part.roles)
        wanted = f"{{{roles}}}_proj" if len(part.roles) > 1 else part.roles[0].name
        raise LayersError(
            f"{none}: no tensor of a language model is named …layers.{{i}}.{part.path}.{wanted}.weight{because}{there}"
        )
    left = _fitting(part, modules, config)
    fitting = [prefix for prefix in left if modules[prefix].having]
    if len(left) > 1 and len(fitting) == 1:
        left = fitting
    if len(left) > 1:
        layers = " and ".join(f"{layer_name(prefix, min(modules[prefix].layers))}.*" for prefix in left)
        why = f"there is no {CONFIG}" if config is None else f"each has all that {CONFIG} says"
        raise LayersError(
            f"{len(left)} modules have layers, {layers}, and {why}: which is the language model cannot be told; give a "
            "checkpoint that holds one of them"
        )
    if not fitting:
        there = _nearest(part, (name for name in other_names if name.startswith(left[0])))
        raise LayersError(
            f"{none}: the language model's layers are {left[0]}layers.*, and those of {', '.join(having)} are "
            f"another module's{there}"
        )
    return left[0]


def language_modules(names: Collection[str], config: ModelConfig | None) -> list[str]:
    """The prefixes of the modules that may be the language model, by the names of their layers alone."""
    return _fitting(DENSE_FFN, _modules(DENSE_FFN, {}, names), config)


def _nearest(part: Part, names: Iterable[str]) -> str:
    """To be added to a line that says that there is no dense layer."""
    return what_is_there(names) if part.place is Place.DENSE_LAYERS else ""


def _stands_beside(name: str, part: Part) -> bool:
    """Whether a name would be one of the part's, if its module were the language model."""
    parsed = parse_layer(name)
    if parsed is None or not stands_beside(parsed[0]):
        return False
    return parse_tensor(name.removeprefix(parsed[0]), part) is not None


def _modules(part: Part, tensors: Mapping[str, Tensor], other_names: Iterable[str]) -> dict[str, _Module]:
    """By prefix, without those whose names say that they are none."""
    found: dict[str, _Module] = {}
    for name in (*tensors, *other_names):
        parsed = parse_layer(name)
        if parsed is not None:
            found.setdefault(parsed[0], _Module()).add(parsed[1], parsed[2])
    for name, tensor in tensors.items():
        own = parse_tensor(name, part)
        if own is not None and own.layer is not None:
            found[own.prefix].having.add(own.layer)
            if own.role == part.modules[-1].name and own.suffix == "weight" and tensor.dtype in _UNPACKED:
                found[own.prefix].shapes.add(tensor.shape)
    return {prefix: module for prefix, module in found.items() if not stands_beside(prefix)}


def _fitting(part: Part, modules: Mapping[str, _Module], config: ModelConfig | None) -> list[str]:
    """The modules that are left when those go that lack what another has of what config.json says of a language model.

    In that order: of a download in parts only the dense layers may be there, beside a tower that is whole.
    """
    signs: list[Callable[[_Module], bool]] = [lambda module: module.mixes, lambda module: module.has_experts]
    if config is not None:
        size = part.weight_shape(part.modules[-1], config)
        named = (config.dense_layers if part.place is Place.DENSE_LAYERS else None) or frozenset()
        last = config.num_hidden_layers - 1
        signs = [
            lambda module: 0 in size or module.shapes <= {size},  # 0: config.json does not say it
            lambda module: module.having >= named,
            *signs,
            lambda module: max(module.layers) >= last,
        ]
    left = set(modules)
    for sign in signs:
        left = {prefix for prefix in left if sign(modules[prefix])} or left
    return sorted(left)
