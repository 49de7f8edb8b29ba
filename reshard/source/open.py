"""From an address to a source and its description."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from reshard.checkpoint.description import Checkpoint
from reshard.errors import ManifestError, MissingDependencyError, ReshardError, SourceError, UsageError
from reshard.fit import absent_parts
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.model.parts import DENSE_FFN, PARTS, Part
from reshard.source.address import FOLDER, HUBS, WEB, Address, Hub, parse_address
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.folder import FolderSource
from reshard.source.retry import Notify, RetryPolicy
from reshard.source.shardset import read_manifest_only, read_shard_set, require_shard_set
from reshard.source.weights import sets_within

if TYPE_CHECKING:
    from reshard.source.range_cache import Remote

T = TypeVar("T")


def open_source(
    address: str,
    revision: str | None = None,
    *,
    index: str | None = None,
    notify: Notify = lambda line: None,
    policy: RetryPolicy | None = None,
) -> Source:
    """The source at an address (see reshard.source.address).

    Raises SourceError if there is none, SeveralSets if it is a folder of some, MissingDependencyError without the
    package that reads it.

    revision: of a hub repository. index: the file that says where the weights are, where there are several: see
    reshard.source.choice. notify: takes a line for each wait after a fault.
    """
    source = _open(parse_address(address, revision), index, notify, policy)
    try:
        if within := sets_within(source.files(), source.not_files()):
            raise SeveralSets(address, within)
    except BaseException:
        source.close()
        raise
    return source


def _open(found: Address, index: str | None, notify: Notify, policy: RetryPolicy | None) -> Source:
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


class SeveralSets(SourceError):
    """At an address lie sets of several parts, each in a folder of its part's name. addresses: theirs, by part."""

    def __init__(self, address: str, keys: Sequence[str]) -> None:
        super().__init__(
            f"{address}: holds sets of {', '.join(keys)}; give one: {part_address(address, PARTS[keys[0]])}"
        )
        self.address = address
        self.addresses = {key: part_address(address, PARTS[key]) for key in keys}

    def of(self, part: Part | None) -> str:
        """The address of a part's set, by default the DenseFFN's. Raises UsageError where it is none of them."""
        key = (part or DENSE_FFN).key
        if key in self.addresses:
            return self.addresses[key]
        way_out = "say which with --part" if part is None else f"none of {key}"
        mark = ";" if part is None else ","
        raise UsageError(f"{self.address}: holds sets of {', '.join(self.addresses)}{mark} {way_out}")

    def absent(self) -> str | None:
        """What is said of a set that was cut together with one of these and is not there, if one is.

        Nothing where one of these cannot be read: that is said where it is used.
        """
        manifests = []
        try:
            for address in self.addresses.values():
                with open_source(address) as source:
                    require_shard_set(source)
                    manifests.append(read_manifest_only(source))
        except ReshardError:
            return None
        return absent_parts(self.address, manifests)


def each_set(address: str, use: Callable[[str], T]) -> list[T]:
    """`use` of an address or, where sets of several parts lie there, of the address of each.

    Raises ManifestError where one of them is absent.
    """
    try:
        return [use(address)]
    except SeveralSets as found:
        if found.address != address:  # another source's that `use` opens
            raise
        if line := found.absent():
            raise ManifestError(line) from None
        return [use(one) for one in found.addresses.values()]


def open_part(
    address: str,
    part: Part | None,
    revision: str | None = None,
    *,
    index: str | None = None,
    notify: Notify = lambda line: None,
) -> tuple[str, Source]:
    """The source at an address or, where sets of several parts lie there, at the address of the part's; that address.

    Raises as open_source and SeveralSets.of do.
    """
    try:
        return address, open_source(address, revision, index=index, notify=notify)
    except SeveralSets as found:
        return found.of(part), open_source(found.of(part), index=index, notify=notify)


def part_address(address: str, part: Part) -> str:
    """Where a part's set is, of several that are cut to, or lie at, one address."""
    if address.partition("://")[0].lower() in WEB:
        place = urlsplit(address)  # a signature follows the path
        return urlunsplit(place._replace(path=f"{place.path.rstrip('/')}/{part.key}"))
    first, chained, rest = address.partition("::")
    root = f"{first}://" if chained and "://" not in first else first
    return f"{root if root.endswith('://') else root.rstrip('/') + '/'}{part.key}{chained}{rest}"
