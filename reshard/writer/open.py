"""From an address to a target."""

from collections.abc import Callable, Mapping
from pathlib import Path

from reshard.source.address import FOLDER, parse_target
from reshard.writer.folder import OutputFolder
from reshard.writer.target import Target


def open_target(address: str | Path) -> Target:
    """The target at a folder's path or an address. Raises UsageError or MissingDependencyError."""
    if isinstance(address, Path):
        return OutputFolder(address)
    found = parse_target(address)
    scheme = FOLDER if found.kind == FOLDER else address.partition("://")[0].lower()
    return TARGETS.get(scheme, _fsspec)(found.place)


def _folder(place: str) -> Target:
    return OutputFolder(Path(place))


def _fsspec(place: str) -> Target:
    from reshard.writer.remote import RemoteTarget  # asyncio and a driver, which a folder does without

    return RemoteTarget(place)


# scheme -> what opens it; any other is a file system that fsspec knows
TARGETS: Mapping[str, Callable[[str], Target]] = {FOLDER: _folder}
