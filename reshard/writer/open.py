"""From an address to a target."""

from collections.abc import Callable, Mapping
from pathlib import Path

from reshard.errors import OutputError, UsageError
from reshard.source.address import FOLDER, parse_address, parse_target
from reshard.writer.folder import OutputFolder
from reshard.writer.target import Target


def open_target(address: str | Path) -> Target:
    """The target at a folder's path or an address. Raises UsageError or MissingDependencyError."""
    if isinstance(address, Path):
        return OutputFolder(address)
    found = parse_target(address)
    scheme = FOLDER if found.kind == FOLDER else address.partition("://")[0].lower()
    return TARGETS.get(scheme, _fsspec)(found.place)


def open_output(source: str, out: str, *, resume: bool, overwrite: bool) -> Target:
    """The target of a split. Raises UsageError for options that contradict each other, OutputError for the source."""
    if resume and overwrite:
        raise UsageError("--resume keeps what is there, --overwrite replaces it: give one of them")
    target = open_target(out)
    if _same(source, out):
        raise OutputError(f"{target.address}: is the source itself; choose another folder for the shards")
    return target


def _same(source: str, out: str) -> bool:
    """Whether two addresses are one place."""
    one, other = parse_address(source), parse_target(out)
    if one.kind != other.kind:
        return False
    if one.kind == FOLDER:
        return Path(one.place).exists() and Path(other.place).exists() and Path(one.place).samefile(other.place)
    from reshard.source.filesystems import same_place  # fsspec takes longer to import than a folder to open

    return same_place(one.place, other.place)


def _folder(place: str) -> Target:
    return OutputFolder(Path(place))


def _fsspec(place: str) -> Target:
    from reshard.writer.remote import RemoteTarget  # asyncio and a driver, which a folder does without

    return RemoteTarget(place)


# scheme -> what opens it; any other is a file system that fsspec knows
TARGETS: Mapping[str, Callable[[str], Target]] = {FOLDER: _folder}
