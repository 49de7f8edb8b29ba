"""From an address to a source and its description."""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from reshard.checkpoint.description import Checkpoint
from reshard.errors import MissingDependencyError, OutputError, SourceError, UsageError
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.model.parts import DENSE_FFN, PARTS, Part
from reshard.source.address import FOLDER, HUBS, WEB, Hub, parse_address
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.folder import FolderSource
from reshard.source.retry import Notify, RetryPolicy
from reshard.source.shardset import read_shard_set, require_shard_set
from reshard.source.weights import sets_within

if TYPE_CHECKING:
    from reshard.source.range_cache import Remote


def open_source(
    address: str,
    revision: str | None = None,
    *,
    index: str | None = None,
    notify: Notify = lambda line: None,
    policy: RetryPolicy | None = None,
) -> Source:
    """The source at an address (see reshard.source.address).

    Raises SourceError if there is none, MissingDependencyError without the package that reads it.

    revision: of a hub repository. index: the file that says where the weights are, where there are several: see
    reshard.source.choice. notify: takes a line for each wait after a fault.
    """
    found = parse_address(address, revision)
    if found.kind == FOLDER:
        return FolderSource(Path(found.place), index)
    # Only here: huggingface_hub and fsspec take longer to import than a folder to open.
    from reshard.source.range_cache import StagedSource

    find: Callable[[], Remote]
    if found.kind in HUBS:
        find = partial(_finder(HUBS[found.kind], found.place), found.place, found.revision)
    else:
        is_web = found.place.partition("://")[0].lower() in WEB
        find = partial(import_module(f"reshard.source.{'web' if is_web else 'remote'}").find_folder, found.place)
    return StagedSource(found.place, find, policy or RetryPolicy(), notify, index)


def _finder(hub: Hub, repo: str) -> "Callable[[str, str | None], Remote]":
    """A hub's `find_repository`. Raises SourceError for an endpoint that is no address, MissingDependencyError."""
    endpoint = os.environ.get(hub.endpoint)
    if endpoint is not None and not _is_host(endpoint):
        raise SourceError(f"{hub.endpoint}={endpoint}: is no hub's address; write it as https://HOST, or unset it")
    try:
        find: Callable[[str, str | None], Remote] = import_module(hub.module).find_repository
    except ImportError as error:
        raise MissingDependencyError(
            f"{repo}: no local folder with that name, and a repository on the Hub",
            f"{hub.package}>={hub.since}",
            f"installed is {_installed(hub.package)}; {error}",
        ) from None
    return find


def _is_host(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_more = "?" in text or "#" in text  # paths are put behind it
        return parts.scheme in WEB and bool(parts.hostname) and parts.port != 0 and not has_more
    except ValueError:
        return False


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def describe(source: Source, scheme: str | None = None, part: Part | None = None) -> Checkpoint:
    """A part of a checkpoint, by default the DenseFFN, or what a shard set holds.

    scheme: see read_checkpoint; a set's manifest says its own. Raises UsageError for a scheme beside a set, and where
    a set is of another part.
    """
    if any(parse_shard_file(name) for name in source.files()):
        require_shard_set(source)
        for option, value in (("--scheme", scheme), ("--index", source.index)):
            if value is not None:
                raise UsageError(f"{option} {value}: {source.origin.name} is a shard set, whose {MANIFEST} says it")
        checkpoint = read_shard_set(source)
        if part not in (None, checkpoint.part):
            raise UsageError(f"{source.origin.name}: is a set of {checkpoint.part.key}, {part.key} is asked for")
        return checkpoint
    return read_checkpoint(source, scheme, part or DENSE_FFN)


def set_addresses(address: str) -> list[str]:
    """The shard sets at an address: that one, or in a folder without weights those within, one for each part."""
    found = parse_address(address)
    if found.kind == FOLDER:
        with FolderSource(Path(found.place)) as source:
            within = sets_within(source.files(), source.not_files())
            return [part_address(address, PARTS[key]) for key in within] or [address]
    return [address]


def part_of_sets(address: str, part: Part | None) -> str:
    """The set of a part, by default the DenseFFN, where sets of several lie at an address; else that address.

    Raises UsageError where none of these is of the part.
    """
    within = set_addresses(address)
    wanted = part_address(address, part or DENSE_FFN)
    if within == [address] or wanted in within:
        return wanted if wanted in within else address
    held = ", ".join(name.rpartition("/")[2] for name in within)
    raise UsageError(
        f"{address}: holds sets of {held}" + ("; say which with --part" if part is None else f", none of {part.key}")
    )


def check_holds_no_set(address: str) -> None:
    """Raises OutputError where a set lies where folders of several are to be: readers would see it alone."""
    found = parse_address(address)
    if found.kind == FOLDER and Path(found.place).is_dir():
        with FolderSource(Path(found.place)) as source:
            if any(parse_shard_file(name) for name in source.files()):
                raise OutputError(f"{address}: holds a shard set; several parts go into a folder without one")


def part_address(address: str, part: Part) -> str:
    """Where a part's set is, of several that are cut to, or lie at, one address."""
    return f"{address.rstrip('/')}/{part.key}"
