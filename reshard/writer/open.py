"""From an address to a target."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from reshard.errors import OutputError
from reshard.model.naming import parse_shard_file
from reshard.source.address import FOLDER, Address, parse_address, parse_target
from reshard.source.folder import FolderSource
from reshard.writer.folder import OutputFolder
from reshard.writer.target import Target


def open_target(address: str | Path, source: str | None = None, *, in_out: bool = False) -> Target:
    """The target at a folder's path or an address. source: an address that must be another place. in_out: it lies in
    OUT, where nothing is followed.

    Raises UsageError, OutputError or MissingDependencyError.
    """
    if isinstance(address, Path):
        return OutputFolder(address)
    found = parse_target(address)
    if source is not None and _same_place(parse_address(source), found):
        raise OutputError(f"{address}: is the source itself; choose another folder for the shards")
    if in_out and found.kind == FOLDER and os.path.islink(found.place):
        raise OutputError(f"{found.place} is a link, expected a folder; remove it, or choose another OUT")
    scheme = FOLDER if found.kind == FOLDER else address.partition("://")[0].lower()
    return TARGETS.get(scheme, _fsspec)(found.place)


def check_holds_no_set(address: str) -> None:
    """Raises OutputError where a set lies where folders of several are to be: readers would see it alone."""
    found = parse_target(address)
    if found.kind != FOLDER:
        files: Iterable[str] = open_target(address).files()
    elif Path(found.place).is_dir():
        with FolderSource(Path(found.place)) as source:
            files = source.files()
    else:
        return
    if any(parse_shard_file(name) for name in files):
        raise OutputError(f"{address}: holds a shard set; several parts go into a folder without one")


def _same_place(one: Address, other: Address) -> bool:
    if one.kind != other.kind:
        return False
    if one.kind == FOLDER:
        with contextlib.suppress(OSError):  # one of them is not there, or hidden: who opens it says so
            return Path(one.place).samefile(other.place)
        return False
    from reshard.source.filesystems import same_place  # fsspec takes longer to import than a folder to open

    return same_place(one.place, other.place)


def _folder(place: str) -> Target:
    return OutputFolder(Path(place))


def _fsspec(place: str) -> Target:
    from reshard.writer.remote import RemoteTarget  # asyncio and a driver, which a folder does without

    return RemoteTarget(place)


# scheme -> what opens it; any other is a file system that fsspec knows
TARGETS: Mapping[str, Callable[[str], Target]] = {FOLDER: _folder}
