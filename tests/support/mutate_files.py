"""Mutations of files: bytes, the headers of safetensors files, and what stands under a name."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.support import mutate
from tests.support.mutate_tree import Members, Node, encode, member, parse


def replace(path: Path, data: bytes) -> None:
    """A file of these bytes under the name, whatever stood there; a hard link's other names keep theirs."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def mutate_bytes(rng: random.Random, raw: bytes, start: int = 0, stop: int | None = None) -> tuple[bytes, str]:
    """Bytes [start, stop) changed, in one way."""
    stop = len(raw) if stop is None else stop
    at = rng.randrange(start, max(start + 1, stop))
    length = min(rng.choice([1, 2, 8, 100, 4096]), max(1, stop - at))
    other = rng.randrange(start, max(start + 1, stop - length + 1))
    changes: dict[str, Callable[[], bytes]] = {
        "one bit": lambda: raw[:at] + bytes(b ^ 1 << rng.randrange(8) for b in raw[at : at + 1]) + raw[at + 1 :],
        "other bytes": lambda: raw[:at] + rng.randbytes(length) + raw[at + length :],
        "zeros": lambda: raw[:at] + bytes(length) + raw[at + length :],
        "bytes less": lambda: raw[:at] + raw[at + length :],
        "bytes more": lambda: raw[:at] + rng.randbytes(length) + raw[at:],
        "cut short": lambda: raw[:at],
        "longer": lambda: raw + bytes(length),
        "other place's bytes": lambda: raw[:at] + raw[other : other + length] + raw[at + length :],
    }
    said = rng.choice(sorted(changes))
    return changes[said](), f"{said}: {length} bytes at {at}"


def split_header(raw: bytes) -> tuple[Node, bytes]:
    """A safetensors file's header as a tree, and the bytes behind it."""
    length = int.from_bytes(raw[:8], "little")
    return parse(raw[8 : 8 + length]), raw[8 + length :]


def join_header(tree: Node, data: bytes, fill_to: int = 0) -> bytes:
    """A file of a header and data; the header filled with spaces up to where the data began, if it fits."""
    text = encode(tree)
    text += b" " * max(0, fill_to - 8 - len(text))
    return len(text).to_bytes(8, "little") + text + data


def mutate_header(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """A safetensors file with another header: its length, an entry, its text."""
    kind = rng.random()
    start = 8 + int.from_bytes(raw[:8], "little")
    if kind < 0.15:
        length = rng.choice([0, 1, start - 9, start, len(raw), 100_000_001, 2**40, 2**63, 2**64 - 1])
        return length.to_bytes(8, "little") + raw[8:], f"a header of {length} bytes"
    if kind < 0.25:
        text, said = mutate.mutate_text(rng, raw[8:start])
        return len(text).to_bytes(8, "little") + text + raw[start:], f"header: {said}"
    if kind < 0.35:
        changed, said = mutate_bytes(rng, raw, 0, start)
        return changed, f"header: {said}"
    tree, data = split_header(raw)
    said = mutate.mutate(rng, tree, ("__metadata__", "dtype", "shape", "data_offsets"))
    if kind < 0.42 and isinstance(tree, Members) and isinstance(shape := _shape(rng, tree), list):
        shape[:] = rng.choice([[2**62] * 1_000_000 + [0], [0, *shape], [2**62] * 60, [1] * 100 + shape])
        said = f"a shape of {len(shape)} dimensions"
    fill_to = start if rng.random() < 0.7 else 0
    return join_header(tree, data, fill_to), f"header: {said}{'' if fill_to else ', not filled'}"


def _shape(rng: random.Random, tree: Members) -> Node:
    name, entry = rng.choice(tree)
    return member(entry, "shape") if name != "__metadata__" else None


def mutate_kind(rng: random.Random, path: Path) -> str:
    """Something else under a file's name."""
    raw = path.read_bytes()
    path.unlink()
    kinds: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "a FIFO": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to a folder": lambda: path.symlink_to("."),
        "empty": lambda: path.write_bytes(b""),
        "full of zeros": lambda: path.write_bytes(bytes(len(raw))),
        "enormous and sparse": lambda: _sparse(path, raw),
    }
    said = rng.choice(sorted(kinds))
    kinds[said]()
    return said


def _sparse(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    os.truncate(path, 1 << 40)
