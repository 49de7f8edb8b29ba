"""Cut the DenseFFN weights of a checkpoint into one verified safetensors shard per rank.

    result = reshard.split("DeepSeek-R1-W8A8", "r1-tp8", tp=8)
    same = reshard.verify("r1-tp8", "DeepSeek-R1-W8A8").ok

A name is imported when it is first asked for: the command line's start needs nothing of what the functions need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reshard.api import check, merge, split, verify
    from reshard.errors import (
        AlignmentError,
        BusyError,
        GroupError,
        HeaderError,
        HostError,
        LayersError,
        ManifestError,
        MismatchError,
        MissingDependencyError,
        OutputError,
        ProfileError,
        ReshardError,
        SchemeError,
        ShapesError,
        ShardError,
        SourceError,
        SpaceError,
        TokensError,
        UnforeseenError,
        UsageError,
    )
    from reshard.manifest import Manifest

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "BusyError",
    "GroupError",
    "HeaderError",
    "HostError",
    "LayersError",
    "Manifest",
    "ManifestError",
    "MismatchError",
    "MissingDependencyError",
    "OutputError",
    "ProfileError",
    "ReshardError",
    "SchemeError",
    "ShapesError",
    "ShardError",
    "SourceError",
    "SpaceError",
    "TokensError",
    "UnforeseenError",
    "UsageError",
    "check",
    "merge",
    "split",
    "verify",
]

_HOMES = {"Manifest": "manifest", "check": "api", "merge": "api", "split": "api", "verify": "api"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"reshard.{_HOMES.get(name, 'errors')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
