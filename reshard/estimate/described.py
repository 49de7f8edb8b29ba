"""What is estimated: a checkpoint, as it is or converted, or the one that a config.json alone describes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reshard.checkpoint import Checkpoint, Identity, Part, Tensor, describe_layers
from reshard.convert.rules import BF16, KEEP, W8A8, converted
from reshard.errors import SchemeError, SourceError
from reshard.modelconfig import read_model_config
from reshard.naming import CONFIG, DOWN, ROLES, module_name
from reshard.record import scheme_name
from reshard.source.base import parse_json_object
from reshard.synth.model import Kind, Parameter
from reshard.synth.schemes import declare_in_config, description, recipe_for, tensors_of

DEFAULT_SCHEMES = ("bf16", "w8a8_dynamic")  # of a config.json, which names no scheme that a device would run
_CONVERSIONS = {"bf16": BF16, "w8a8_dynamic": W8A8}
_ALIASES = {"w8a8": "w8a8_dynamic"}
_DESCRIPTION = "quant_model_description.json"


def plain_scheme(scheme: str) -> str:
    """The scheme that a word of the command line means."""
    return _ALIASES.get(scheme, scheme)


def in_scheme(checkpoint: Checkpoint, scheme: str) -> Checkpoint:
    """The checkpoint in `scheme`: as it is (`keep`, or its own), or as `split --weights` would make it.

    Raises SchemeError for a scheme that it does not become.
    """
    own = scheme_name(checkpoint.layers)
    if scheme in (KEEP, own):
        return checkpoint
    if scheme not in _CONVERSIONS:
        raise SchemeError(
            f"scheme {scheme}: the checkpoint is {own}, and --weights makes {' and '.join(_CONVERSIONS)} only; give "
            f"keep, {', '.join(_CONVERSIONS)}, or a config.json with --config"
        )
    return converted(checkpoint, _CONVERSIONS[scheme])


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises SourceError if it cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(raw, str(path))


def from_config(config: Mapping[str, Any], name: str, scheme: str) -> Checkpoint:
    """The DenseFFN of a checkpoint that `scheme` would be made for: names, types and shapes, no files.

    Raises SourceError where config.json gives no dense layers, SchemeError for a scheme that nothing writes.
    """
    model, recipe = read_model_config(config), recipe_for(scheme)
    if not model.dense_layers:
        raise SourceError(f"{CONFIG}: no layer of the model is dense ({model.reason})")
    sizes = (model.intermediate_size, model.hidden_size)
    parameters = [
        Parameter(f"{module_name(layer, role)}.weight", sizes[::-1] if role == DOWN else sizes, Kind.LINEAR)
        for layer in sorted(model.dense_layers)
        for role in ROLES
    ]
    declared, types = dict(config), description(recipe, parameters)
    declare_in_config(declared, recipe, parameters)
    tensors = {
        spec.name: Tensor(spec.name, spec.dtype, spec.shape, (Part(CONFIG, 0, 0, 0, 0, 0, 0),))
        for parameter in parameters
        for spec in tensors_of(parameter, recipe)
    }
    described, layers, _ = describe_layers(tensors, (), declared, (_DESCRIPTION, types) if types else None)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Checkpoint(Identity("folder", name, None, ()), described, layers, {}, len(tensors), nbytes)
