"""From an address to a target, and from a place to a team."""

import contextlib
from pathlib import Path

from reshard.writer.folder import OutputFolder
from reshard.writer.target import Target
from reshard.writer.team import Alone, Place, Team

_HERE = ("file://", "local://")


def is_remote(address: str) -> bool:
    """Whether it is an fsspec address, and none of this host's own file system."""
    return "://" in address and not address.startswith(_HERE)


def local_path(address: str) -> Path:
    """The path of an address that is not remote."""
    for scheme in _HERE:
        address = address.removeprefix(scheme)
    return Path(address)


def open_target(address: str | Path) -> Target:
    """The target at a folder's path or an fsspec address. Raises UsageError or MissingDependencyError."""
    if isinstance(address, str) and is_remote(address):
        from reshard.writer.remote import RemoteTarget  # asyncio and a driver, which a folder does without

        return RemoteTarget(address)
    return OutputFolder(address if isinstance(address, Path) else local_path(address))


def open_team(place: Place) -> contextlib.AbstractContextManager[Team]:
    """The team at a place. Raises GroupError where the others do not come, MissingDependencyError without torch."""
    if place.size == 1:
        return contextlib.nullcontext(Alone())
    from reshard.writer.gloo import GlooTeam  # torch

    return GlooTeam(place)
