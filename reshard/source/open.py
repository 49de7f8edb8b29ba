"""From an address to a source and its description."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from reshard.checkpoint.description import Checkpoint
from reshard.errors import MissingDependencyError, SourceError, UsageError
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.source.address import parse_address, redacted
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.folder import FolderSource
from reshard.source.retry import Notify, Patience
from reshard.source.shardset import read_shard_set, require_shard_set

if TYPE_CHECKING:
    from reshard.source.hub import HubFiles

# The first huggingface_hub that names its own HTTP client, httpx or httpx2. The project asks for no version of it: an
# engine's environment may want an older one, and only here is it used.
_HUB = "1.31"


def open_source(
    address: str,
    revision: str | None = None,
    *,
    index: str | None = None,
    notify: Notify = lambda line: None,
    patience: Patience | None = None,
) -> Source:
    """The source at an address (see reshard.source.address).

    Raises SourceError if there is none, MissingDependencyError without the package that reads it.

    revision: of a hub repository. index: the file that says where the weights are, where there are several: see
    reshard.source.choice. notify: takes a line for each wait after a fault.
    """
    found = parse_address(address, revision)
    if found.kind == "folder":
        return FolderSource(Path(found.place), index)
    # Only here: huggingface_hub and fsspec take longer to import than a folder to open.
    from reshard.source.range_cache import StagedSource

    if found.kind == "hub":
        _check_endpoint()
        return StagedSource(_hub_files(found.place, found.revision), patience or Patience(), notify, index)
    from reshard.source.remote import RemoteFiles

    return StagedSource(RemoteFiles(found.place), patience or Patience(), notify, index)


def _check_endpoint() -> None:
    """Raises SourceError for an HF_ENDPOINT that is no address; with some, huggingface_hub cannot be imported."""
    text = os.environ.get("HF_ENDPOINT")
    if text is None:
        return
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SourceError(f"HF_ENDPOINT={redacted(text)}: is no hub's address; write it as https://HOST, or unset it")


def _hub_files(repo: str, revision: str | None) -> "HubFiles":
    try:
        from reshard.source.hub import HubFiles
    except ImportError as error:
        raise MissingDependencyError(
            f"{repo}: no folder is called so, and a repository on the Hub is read with huggingface_hub {_HUB} or "
            f"later, installed is {_installed('huggingface_hub')} ({error}); pip install -U 'huggingface_hub>={_HUB}'"
        ) from None
    return HubFiles(repo, revision)


def _installed(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def describe(source: Source, scheme: str | None = None) -> Checkpoint:
    """The DenseFFN of a checkpoint or of a shard set. scheme: see read_checkpoint; a set's manifest says its own.

    Raises UsageError for a scheme beside a set.
    """
    if any(parse_shard_file(name) for name in source.files()):
        require_shard_set(source)
        for option, value in (("--scheme", scheme), ("--index", source.index)):
            if value is not None:
                raise UsageError(f"{option} {value}: {source.origin.name} is a shard set, whose {MANIFEST} says it")
        return read_shard_set(source)
    return read_checkpoint(source, scheme)
