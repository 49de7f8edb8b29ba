"""The scheme in which a checkpoint is estimated: its own, or one that it would be converted to."""

from reshard.checkpoint.description import Checkpoint
from reshard.convert.rules import BF16, KEEP, W8A8, converted
from reshard.errors import SchemeError
from reshard.plan.manifest_builder import scheme_name

DEFAULT_SCHEMES = ("bf16", "w8a8_dynamic")  # of a config.json, which names no scheme that a device would run
_CONVERSIONS = {"bf16": BF16, "w8a8_dynamic": W8A8}
_ALIASES = {"w8a8": "w8a8_dynamic"}


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
