"""From an address to a source and its description."""

from pathlib import Path

from reshard.address import parse_address
from reshard.checkpoint import Checkpoint
from reshard.naming import parse_shard_file
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.folder import FolderSource
from reshard.source.shardset import read_shard_set, require_shard_set
from reshard.source.transport import Notify, Patience


def open_source(
    address: str,
    revision: str | None = None,
    *,
    notify: Notify = lambda line: None,
    patience: Patience | None = None,
) -> Source:
    """The source at an address (see reshard.address). Raises SourceError if there is none.

    revision: of a hub repository. notify: takes a line for each wait after a fault.
    """
    found = parse_address(address, revision)
    if found.kind == "folder":
        return FolderSource(Path(found.place))
    # Only here: huggingface_hub and fsspec take longer to import than a folder to open.
    from reshard.source.staged import StagedSource

    if found.kind == "hub":
        from reshard.source.hub import HubFiles

        return StagedSource(HubFiles(found.place, found.revision), patience or Patience(), notify)
    from reshard.source.remote import RemoteFiles

    return StagedSource(RemoteFiles(found.place), patience or Patience(), notify)


def describe(source: Source) -> Checkpoint:
    """The DenseFFN of a checkpoint or of a shard set."""
    if any(parse_shard_file(name) for name in source.files()):
        require_shard_set(source)
        return read_shard_set(source)
    return read_checkpoint(source)
