"""Which files of a folder are the checkpoint's weights. Of two accounts neither is believed: `index` says which."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from reshard.errors import SourceError
from reshard.recognise import rank_files
from reshard.source.base import Source, parse_json_object, read_file
from reshard.weights import INDEX_ENDING, SINGLE, WEIGHTS_ENDING, engines

_SHOWN = 3
_TELL = "say which is meant with --index"
_ADAPTER = "a LoRA adapter, which is not merged into the weights (peft's merge_and_unload does that)"
_NATIVE = "Mistral's own format of the same weights, which is left aside"
# Files that lie beside a checkpoint's and are no part of it.
_BESIDE = (
    (re.compile(r"adapter_model.*\.safetensors(\.index\.json)?"), _ADAPTER),
    (re.compile(r"consolidated.*\.safetensors(\.index\.json)?"), _NATIVE),
)
# What folders without safetensors hold instead: (name, what it is, the way out).
_INSTEAD: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r".+\.(bin|pth?|ckpt)"),
        "PyTorch files",
        "convert them: transformers' from_pretrained(…).save_pretrained(OUT) writes safetensors",
    ),
    (re.compile(r".+\.gguf"), "GGUF files of llama.cpp", "give the safetensors checkpoint that they were made from"),
    (re.compile(r".+\.(h5|msgpack|onnx|npz|nemo|pdparams)"), "files of another framework", "convert them"),
    (re.compile(r".+\.(aria2|incomplete|part|crdownload)"), "unfinished downloads", "let them finish"),
)


@dataclass(frozen=True)
class Choice:
    """The weights' files, by name, and the index that names them, if one does. A named file may be missing."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()


def choose(source: Source) -> Choice:
    """Raises SourceError where nothing is there to choose, or nothing says which of two accounts to take."""
    files = source.files()
    files = source.files()
    choice = _told(source, source.index) if source.index is not None else _untold(source)
    if ranks := rank_files(choice.files):
        raise SourceError(
            f"{source.origin.name}: {named(ranks[0])}: already cut per rank, by {ranks[1]}; give the original "
            "checkpoint, from which they were made"
        )
    others = {name: _what(name) for name in sorted(files) if name.endswith(WEIGHTS_ENDING) and name not in choice.files}
    # An index says that what it does not name is left aside; of an adapter that is worth a word all the same.
    worth = {_ADAPTER} if choice.index else {_ADAPTER, _NATIVE}
    beside = tuple(f"{name} is {what}" for name, what in others.items() if what in worth)
    return replace(choice, warnings=(*choice.warnings, *beside))


def _told(source: Source, index: str) -> Choice:
    files = source.files()
    if index not in files or not index.endswith((WEIGHTS_ENDING, INDEX_ENDING)):
        known = sorted(name for name in files if name.endswith((WEIGHTS_ENDING, INDEX_ENDING)))
        raise SourceError(
            f"--index {index}: {source.origin.name} has no such index and no such safetensors file; it has "
            f"{named(known) or 'none at all'}"
        )
    if index.endswith(WEIGHTS_ENDING):
        return Choice((index,))
    return _indexed(index, read_index(source, index))


def _untold(source: Source) -> Choice:
    files = source.files()
    weights = _own(name for name in files if name.endswith(WEIGHTS_ENDING))
    indexes = _own(name for name in files if name.endswith(INDEX_ENDING))
    maps = {name: read_index(source, name) for name in indexes}
    dead = [name for name, weight_map in maps.items() if not set(weight_map.values()) & files.keys()]
    warnings: tuple[str, ...] = ()
    if dead and (len(dead) < len(maps) or weights):
        warnings = tuple(f"{name} names no file that is there; it is passed over" for name in dead)
        maps = {name: weight_map for name, weight_map in maps.items() if name not in dead}
    if len(maps) > 1:
        first, second, *_ = maps
        raise SourceError(f"two indexes, {first} and {second}: {engines(files)}; {_TELL} {first} or --index {second}")
    if maps:
        ((index, weight_map),) = maps.items()
        if SINGLE in files and SINGLE not in weight_map.values():
            raise SourceError(
                f"{SINGLE} stands beside {index}, which does not name it: two accounts of the weights "
                f"({engines(files)}); {_TELL} {index} or --index {SINGLE}"
            )
        return _indexed(index, weight_map, warnings)
    if not weights:
        raise SourceError(f"{source.origin.name}: holds no safetensors file of a checkpoint{_instead(source)}")
    return Choice(tuple(weights), warnings=warnings)


def _indexed(index: str, weight_map: Mapping[str, str], warnings: tuple[str, ...] = ()) -> Choice:
    return Choice(tuple(sorted(set(weight_map.values()))), index, weight_map, warnings)


def _own(names: Iterable[str]) -> list[str]:
    """Those of the checkpoint; Mistral's own only where there are no others."""
    by_kind: dict[str | None, list[str]] = {}
    for name in sorted(names):
        by_kind.setdefault(_what(name), []).append(name)
    return by_kind.get(None) or by_kind.get(_NATIVE) or []


def _what(name: str) -> str | None:
    return next((what for pattern, what in _BESIDE if pattern.fullmatch(name)), None)


def _instead(source: Source) -> str:
    """What a folder without weights has, and the way out."""
    files, folders = sorted(source.files()), sorted(source.folders())
    if folders:
        return (
            f"; {named(folders)} in it {'does' if len(folders) == 1 else 'do'}: give the folder that has the whole "
            "checkpoint (where each has one rank's part, the program that wrote them must put them together)"
        )
    for name in files:
        if _what(name) == _ADAPTER:
            return f"; {name} is {_ADAPTER}: give the model that it belongs to"
    for pattern, what, way in _INSTEAD:
        if found := [name for name in files if pattern.fullmatch(name)]:
            return f"; it has {what} ({named(found)}), which are not read: {way}"
    return f"; it has {named(files) or 'no files'}: give the folder that has the checkpoint's"


def named(names: Sequence[str]) -> str:
    """The first few."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_index(source: Source, file: str) -> dict[str, str]:
    """Tensor -> file, each beside the index. Raises SourceError for a path that is not."""
    weight_map = parse_json_object(read_file(source, file), file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{file}: has no weight_map; put the checkpoint's own index there")
    return {tensor: _beside(file, tensor, name) for tensor, name in weight_map.items()}


def _beside(file: str, tensor: str, name: object) -> str:
    plain = str(PurePosixPath(name)) if isinstance(name, str) else ""  # without ./
    if plain in {"", ".", ".."} or "/" in plain:
        raise SourceError(
            f"{file}: {tensor} is said to be in {name!r}, which is no file of this folder; put the file, or a link "
            "to it, beside the index, and its name into it"
        )
    return plain
