"""The scheme in which a checkpoint is estimated: its own, or one that it would be converted to."""

from reshard.checkpoint.description import Checkpoint
from reshard.convert.rules import KEEP, converted
from reshard.errors import SchemeError
from reshard.plan.manifest_builder import scheme_name
from reshard.schemes import SCHEMES

_OPTIONS = {scheme.name: scheme.option for scheme in SCHEMES.values() if scheme.option}

DEFAULT_SCHEMES = tuple(_OPTIONS)  # of a config.json, which names no scheme that a device would run


def plain_scheme(scheme: str) -> str:
    """The scheme that a word of the command line means: its name, or what `--weights` calls it."""
    return next((name for name, option in _OPTIONS.items() if option == scheme), scheme)


def in_scheme(checkpoint: Checkpoint, scheme: str) -> Checkpoint:
    """The checkpoint in `scheme`: as it is (`keep`, or its own), or as `split --weights` would make it.

    Raises SchemeError for a scheme that it does not become.
    """
    own = scheme_name(checkpoint.layers)
    if scheme in (KEEP, own):
        return checkpoint
    if scheme not in _OPTIONS:
        raise SchemeError(
            f"scheme {scheme}: the checkpoint is {own}, and --weights makes {' and '.join(_OPTIONS)} only; give "
            f"keep, {', '.join(_OPTIONS)}, or a config.json with --config"
        )
    return converted(checkpoint, _OPTIONS[scheme])
