"""Where a checkpoint has a part: under which prefix, in which layers. From names and config.json alone."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from reshard import limits
from reshard.checkpoint.description import Tensor
from reshard.errors import LayersError
from reshard.model.config import ModelConfig, agree_on_dense, is_mtp_layer
from reshard.model.naming import (
    CONFIG,
    PREFIX,
    WRAPPED,
    layer_name,
    layers_named,
    linear_name,
    numbers,
    parse_layer,
    parse_tensor,
)
from reshard.model.parts import LM_HEAD, Part, Place
from reshard.model.prefix import language_modules, language_prefix

Linears = dict[str, dict[str, Tensor]]
"""Tensors by the linear's name and suffix."""


@dataclass(frozen=True)
class Found:
    """A part's tensors by layer, None for a part that the model has once, and what precedes their names."""

    prefix: str
    linears: dict[int | None, Linears]
    warnings: tuple[str, ...]

    @property
    def indexes(self) -> list[int]:
        """The layers that have it."""
        return sorted(layer for layer in self.linears if layer is not None)


def find(
    part: Part,
    tensors: Mapping[str, Tensor],
    other_names: Collection[str],
    config: ModelConfig | None,
    *,
    whole: bool,
) -> Found:
    """tensors: those whose names are the part's. whole: whether the names are all of a checkpoint's, not a set's alone.

    Raises LayersError where the part is not there, or not where config.json says.
    """
    if config is not None and part is LM_HEAD:
        check_untied(config)
    prefix = (language_prefix if part.place.in_layers else _prefix_of_one)(part, tensors, other_names, config)
    found: dict[int | None, Linears] = {}
    for name, tensor in tensors.items():
        parsed = parse_tensor(name, part)
        if parsed is not None and parsed.prefix == prefix:
            found.setdefault(parsed.layer, {}).setdefault(parsed.role, {})[parsed.suffix] = tensor
    if not part.place.in_layers:
        return Found(prefix, found, ())
    if (last := max(layer for layer in found if layer is not None)) >= limits.LAYERS:
        raise LayersError(f"{layer_name(prefix, last)}: more than {limits.LAYERS} layers, which no model has")
    mtp = _mtp_layers(found, prefix, other_names, config)
    for layer in mtp:
        del found[layer]
    indexes = [layer for layer in found if layer is not None]
    if part.place is Place.DENSE_LAYERS:
        by_names = _dense(indexes, config)
    else:
        by_names = _every_layer(part, indexes, prefix, other_names, config, whole=whole)
    if not indexes:
        raise LayersError(f"no {part.name}: only the MTP {layers_named(mtp)} {'have' if len(mtp) > 1 else 'has'} one")
    return Found(prefix, found, (*by_names, *_of_prefix(prefix, bool(by_names)), *_left_alone(part, mtp)))


def check_untied(config: ModelConfig) -> None:
    """Raises LayersError where a model has no LM head of its own."""
    if config.tied is None:
        raise LayersError(
            f"{CONFIG} contradicts itself: tie_word_embeddings is set in one place and not in another, so that whether "
            "the LM head is the embedding cannot be told; make both say it"
        )
    if config.tied:
        raise LayersError(
            f"{CONFIG}: tie_word_embeddings is set: the LM head is the embedding, which --part embedding cuts"
        )


def _prefix_of_one(part: Part, tensors: Iterable[str], other_names: Collection[str], config: ModelConfig | None) -> str:
    """Of a part that the model has once: it stands beside the language model's layers, or beside what holds them."""
    prefixes = {parsed.prefix for name in tensors if (parsed := parse_tensor(name, part))}
    name = part.modules[0].name
    if not prefixes:
        raise LayersError(f"no {part.name}: no tensor is named …{name}.weight")
    language = language_modules((*tensors, *other_names), config)
    if not language and len(prefixes) == 1:
        return prefixes.pop()
    fitting = [prefix for prefix in prefixes if all(module.startswith(prefix) for module in language)]
    if fitting and language:
        return max(fitting, key=len)
    named = " and ".join(sorted(linear_name(prefix, None, name, part) for prefix in prefixes))
    if len(prefixes) == 1:
        layers = " and ".join(f"{module}layers.*" for module in language)
        raise LayersError(f"no {part.name}: {named} is another module's, the language model's layers are {layers}")
    raise LayersError(f"{named}: which is the language model's cannot be told; give a checkpoint that holds one")


def _dense(named: Collection[int], config: ModelConfig | None) -> tuple[str, ...]:
    """Where the names alone say which layers are dense."""
    if config is None:
        return (f"no {CONFIG} beside the files: the dense layers ({numbers(named)}) are taken from names alone",)
    return agree_on_dense(named, config)


def _every_layer(
    part: Part,
    named: Collection[int],
    prefix: str,
    other_names: Iterable[str],
    config: ModelConfig | None,
    *,
    whole: bool,
) -> tuple[str, ...]:
    """Every layer must have it, unless it has something else in its place: another kind of attention."""
    if config is None:
        return (f"no {CONFIG} beside the files: the layers with {part.name} are taken from names alone",) * whole
    if beyond := {layer for layer in named if layer >= config.num_hidden_layers}:
        raise LayersError(
            f"{CONFIG}: num_hidden_layers is {config.num_hidden_layers}, and {numbers(beyond)} is behind the last; is "
            f"{CONFIG} of this checkpoint?"
        )
    if not whole:
        return ()
    lacking = set(range(config.num_hidden_layers)) - set(named)
    rests: dict[int, list[str]] = {}
    for name in other_names:
        parsed = parse_layer(name)
        if parsed and parsed[0] == prefix and parsed[1] in lacking:
            rests.setdefault(parsed[1], []).append(parsed[2])
    for layer in sorted(lacking):
        if layer not in rests or any(rest.startswith(f"{part.path}.") for rest in rests[layer]):
            missing = linear_name(prefix, layer, part.modules[0].name, part)
            raise LayersError(f"{missing}.weight: missing; download the file that holds it again")
    return (f"without {part.path}, and left alone: {layers_named(lacking)}",) if lacking else ()


def _of_prefix(prefix: str, by_names: bool) -> Iterator[str]:
    """Where the names alone say which module is the language model."""
    if prefix not in {"", PREFIX} and (by_names or prefix not in WRAPPED):
        yield f"the language model is taken to be {prefix}layers.*, by names alone"


def _left_alone(part: Part, mtp: Collection[int]) -> Iterator[str]:
    if mtp:
        what = "dense MLP" if part.place is Place.DENSE_LAYERS else part.name
        yield f"the {what} of the MTP {layers_named(mtp)} is left alone: it is no part of the {_named(part)}"


def _named(part: Part) -> str:
    return part.name if part.place is Place.DENSE_LAYERS else f"decoder's {part.name}"


def _mtp_layers(
    named: Iterable[int | None], prefix: str, other_names: Iterable[str], config: ModelConfig | None
) -> tuple[int, ...]:
    """Those of the layers that are multi-token prediction: by config.json's count, or by what else is in them."""
    rests: dict[int, list[str]] = {}
    for name in other_names:
        parsed = parse_layer(name)
        if parsed and parsed[0] == prefix:
            rests.setdefault(parsed[1], []).append(parsed[2])
    last = config.num_hidden_layers if config else None
    count = config.mtp_layers if config else 0
    return tuple(
        layer
        for layer in named
        if layer is not None
        and (
            (last is not None and 0 <= layer - last < count)
            or ((last is None or layer >= last) and is_mtp_layer(rests.get(layer, ())))
        )
    )
