"""From an address to a source and its description."""

from pathlib import Path

from reshard.checkpoint import Checkpoint
from reshard.naming import parse_shard_file
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.folder import FolderSource
from reshard.source.shardset import read_shard_set, require_shard_set


def open_source(address: str) -> Source:
    """The source at a folder's path. Raises SourceError if there is none."""
    return FolderSource(Path(address))


def describe(source: Source) -> Checkpoint:
    """The DenseFFN of a checkpoint or of a shard set."""
    if any(parse_shard_file(name) for name in source.files()):
        require_shard_set(source)
        return read_shard_set(source)
    return read_checkpoint(source)
