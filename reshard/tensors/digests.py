"""BLAKE3 of files, block by block."""

from collections.abc import Callable

from blake3 import blake3

from reshard.source.base import Source


def file_digest(
    source: Source, file: str, stop: int | None = None, tick: Callable[[int], None] = lambda n: None
) -> str:
    """BLAKE3, hex, of a file's bytes up to `stop`, without it of all."""
    hasher = blake3()
    end = source.files()[file] if stop is None else stop
    for block in source.blocks(file, 0, end):
        hasher.update(block.data)
        tick(block.size)
    return hasher.hexdigest()
