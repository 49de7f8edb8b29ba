"""Bad input: ways to damage a checkpoint that `tests.support.builders` wrote, and what the refusal must say."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.errors import ReshardError, SourceError
from tests.support.builders import Raw, Spec, read_folder, read_safetensors, write_safetensors
from tests.support.manifests import Change, edit_manifest

Damage = Callable[[Path], object]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DESCRIPTION = "quant_model_description.json"
EMBED = "model.embed_tokens.weight"
GATE, UP, DOWN = (f"model.layers.0.mlp.{role}_proj" for role in ("gate", "up", "down"))

# Ways out that many messages share.
AGAIN = "again"
OTHER_FILE = "of this checkpoint|belong|again"


@dataclass(frozen=True)
class Case:
    """A checkpoint (a shard set of it, where `cut`), damaged; the message names `says` and offers `way_out`.

    error: the class that is raised. way_out: one of these phrases, parted by "|".
    """

    name: str
    damage: Damage
    says: tuple[str, ...]
    way_out: str
    error: type[ReshardError] = SourceError
    spec: Spec = field(default_factory=Spec)
    tp_size: int = 2
    cut: bool = False


def edited_json(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """A JSON file of one object, changed in place."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def edited_manifest(change: Change) -> Damage:
    """A set's manifest, changed in place; its own digest is right."""
    return lambda folder: edit_manifest(folder, change)


def config(**changes: Any) -> Damage:
    """config.json with other values."""
    return edited_json("config.json", lambda value: value.update(changes))


def described(**changes: Any) -> Damage:
    """ModelSlim's description with other types; None removes a tensor."""

    def change(types: dict[str, Any]) -> None:
        types.update(changes)
        for name in [name for name, kind in types.items() if kind is None]:
            del types[name]

    return edited_json(DESCRIPTION, change)


def mapped(tensor: str, file: str | None) -> Damage:
    """An index that says a tensor is in another file, or nothing of it."""

    def change(index: dict[str, Any]) -> None:
        index["weight_map"][tensor] = file
        if file is None:
            del index["weight_map"][tensor]

    return edited_json(INDEX, change)


def tensors(change: Callable[[dict[str, Raw]], object]) -> Damage:
    """Other tensors, each in the file that held it (new ones in the first), the index kept true."""

    def damage(folder: Path) -> None:
        files = {path.name: read_safetensors(path) for path in sorted(folder.glob("*.safetensors"))}
        holders = {name: file for file, held in files.items() for name in held}
        every = read_folder(folder)
        change(every)
        for file in files:
            held = {name: raw for name, raw in every.items() if holders.get(name, FIRST) == file}
            write_safetensors(folder / file, held, {"format": "pt"})
        (index,) = folder.glob("*.index.json")
        weight_map = {name: holders.get(name, FIRST) for name in every}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def without(*names: str) -> Damage:
    """The checkpoint without some tensors."""
    return tensors(lambda every: [every.pop(name) for name in names])


def with_tensor(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> Damage:
    """A tensor of zeros, new or in place of another."""
    return tensors(lambda every: every.update({name: (dtype, shape, bytes(nbytes))}))


def header(change: Callable[[dict[str, Any]], object], extra: bytes = b"") -> Damage:
    """The first file's header changed, the data after it kept and `extra` put behind."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + extra)

    return damage


def entry(tensor: str, **changes: Any) -> Damage:
    """One entry of the first file's header changed."""
    return header(lambda entries: entries[tensor].update(changes))


def shifted(tensor: str, by: int, extra: bytes = b"", reverse: bool = False) -> Damage:
    """A tensor of the first file and all behind it said to lie `by` bytes further on."""

    def change(entries: dict[str, Any]) -> None:
        at = entries[tensor]["data_offsets"][0]
        for name, found in entries.items():
            if name != "__metadata__" and found["data_offsets"][0] >= at:
                found["data_offsets"] = [offset + by for offset in found["data_offsets"]]
        if reverse:
            for name in reversed(list(entries)):
                entries[name] = entries.pop(name)

    return header(change, extra)


def header_text(text: bytes, claimed: int | None = None) -> Damage:
    """A first file that is only a header, claimed to be as long as it is or of another length."""
    length = len(text) if claimed is None else claimed
    return lambda folder: write(folder / FIRST, length.to_bytes(8, "little") + text)


def resized(file: str, by: int) -> Damage:
    """A file with bytes cut off its end, or zeros added."""

    def damage(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        write(folder / file, raw[:by] if by < 0 else raw + bytes(by))

    return damage


def written(file: str, data: bytes) -> Damage:
    """A file of these bytes, new or in place of another."""
    return lambda folder: write(folder / file, data)


def removed(*files: str) -> Damage:
    """The folder without some files."""

    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def flipped(file: str, at: int) -> Damage:
    """A file with one bit changed."""

    def damage(folder: Path) -> None:
        raw = bytearray((folder / file).read_bytes())
        raw[at] ^= 1
        write(folder / file, bytes(raw))

    return damage


def replaced(file: str, old: bytes, new: bytes) -> Damage:
    """A file with some bytes in place of others of the same number."""
    assert len(old) == len(new)
    return lambda folder: write(folder / file, (folder / file).read_bytes().replace(old, new))


def unharmed(folder: Path) -> None:
    """No damage: the cut itself is what is refused."""


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def write(path: Path, data: bytes) -> None:
    """`Path.write_bytes` without a result."""
    path.write_bytes(data)
