"""From an address to a target, and from a place to a team."""

import contextlib
from pathlib import Path

from reshard.source.address import FOLDER, parse_target
from reshard.writer.folder import OutputFolder
from reshard.writer.target import Target
from reshard.writer.team import Alone, Place, Team


def open_target(address: str | Path) -> Target:
    """The target at a folder's path or an fsspec address. Raises UsageError or MissingDependencyError."""
    if isinstance(address, Path):
        return OutputFolder(address)
    found = parse_target(address)
    if found.kind == FOLDER:
        return OutputFolder(Path(found.place))
    from reshard.writer.remote import RemoteTarget  # asyncio and a driver, which a folder does without

    return RemoteTarget(found.place)


def open_team(place: Place) -> contextlib.AbstractContextManager[Team]:
    """The team at a place. Raises GroupError where the others do not come, MissingDependencyError without torch."""
    if place.size == 1:
        return contextlib.nullcontext(Alone())
    from reshard.writer.gloo import GlooTeam  # torch

    return GlooTeam(place)
