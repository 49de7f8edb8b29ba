"""Shard sets in folders: their files' names, and what stands under them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from reshard.plan.pipeline import Cut
from reshard.writer.split import SplitOptions, SplitResult
from tests.support import running

Files = dict[str, bytes]


def split(source: Path, out: Path, tp: int = 4, cut: Cut | None = None, **options: Any) -> SplitResult:
    """What the command does, by two threads unless `workers` is given."""
    return running.split(source, out, cut or Cut(tp), SplitOptions(**{"workers": 2, **options}))


def shard(rank: int, tp: int = 4) -> str:
    return f"denseffn-rank-{rank:05d}-of-{tp:05d}.safetensors"


def record(rank: int, tp: int = 4) -> str:
    return shard(rank, tp).replace(".safetensors", ".record.json")


def with_records(ranks: Iterable[int]) -> set[str]:
    """What an unfinished set of these ranks holds."""
    return {name for rank in ranks for name in (shard(rank), record(rank))}


def ranks_of(shards: Iterable[Any]) -> list[int]:
    return [entry.tp_rank for entry in shards]


def snapshot(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def hidden(files: Iterable[str]) -> list[str]:
    """Temporary files and locks."""
    return [name for name in files if name.startswith(".")]


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file stands under each name, and when it was written."""
    return {path.name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are looked at, not how they reach the disk; that is tests/writer/test_writer.py's."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
