"""Which files of a folder are the checkpoint's weights. Of two accounts neither is believed: `index` says which."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from reshard.errors import SourceError
from reshard.model.naming import CONFIG
from reshard.source.base import MISSING, Source, read_file
from reshard.source.recognise import UNFINISHED, UNFINISHED_FOLDER, rank_files, unfinished
from reshard.source.weights import INDEX_ENDING, SINGLE, SNAPSHOTS, TRANSFORMERS_KEY, WEIGHTS_ENDING, engines
from reshard.strict_json import parse_object

_SHOWN = 3
_NUMBERED = re.compile(r"(.+-)([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")
_TELL = "say which is meant with"
_ADAPTER = "a LoRA adapter, which is not merged into the weights (peft's merge_and_unload does that)"
_NATIVE = "Mistral's own format of the same weights, which is left aside"
# Files that lie beside a checkpoint's and are no part of it.
_BESIDE = (
    (re.compile(r"adapter_model.*\.safetensors(\.index\.json)?"), _ADAPTER),
    (re.compile(r"consolidated.*\.safetensors(\.index\.json)?"), _NATIVE),
)
_FINISH = "let them finish, or start them again"
# What folders without safetensors hold instead: (name, what it is, the way out).
_INSTEAD: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r".+\.(bin|pth?|ckpt)"),
        "PyTorch files",
        "convert them: transformers' from_pretrained(…).save_pretrained(OUT) writes safetensors",
    ),
    (re.compile(r".+\.gguf"), "GGUF files of llama.cpp", "give the safetensors checkpoint that they were made from"),
    (re.compile(r".+\.(h5|msgpack|onnx|npz|nemo|pdparams)"), "files of another framework", "convert them"),
    (re.compile(rf".+({'|'.join(map(re.escape, UNFINISHED))})"), "unfinished downloads", _FINISH),
)


@dataclass(frozen=True)
class Choice:
    """The weights' files, by name, and the index that names them, if one does.

    Some of the files may be missing: the index names them, or the numbers in the others' names say that they belong
    there. engines: what the engines take of the folder, in words.
    """

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] | None = None
    warnings: tuple[str, ...] = ()
    engines: str = ""


def choose(source: Source) -> Choice:
    """Raises SourceError where nothing is there to choose, or nothing says which of two accounts to take."""
    choice = _told(source, source.index) if source.index is not None else _untold(source)
    if ranks := rank_files(choice.files):
        raise SourceError(
            f"{source.origin.name}: {named(ranks[0])}: already cut per rank, by {ranks[1]}; give the original "
            "checkpoint, from which they were made"
        )
    check_names(choice.files)
    # An index says that what it does not name is left aside; of an adapter that is worth a word all the same.
    worth = {_ADAPTER} if choice.index else {_ADAPTER, _NATIVE}
    others = sorted(name for name in source.files() if name.endswith(WEIGHTS_ENDING) and name not in choice.files)
    beside = tuple(f"{name} is {_what(name)}" for name in others if _what(name) in worth)
    return replace(choice, warnings=(*choice.warnings, *beside))


def check_names(names: Iterable[str]) -> None:
    """Of files that a manifest names. Raises SourceError."""
    for name in names:
        if "\\" in name or name != name.encode("utf-8", "replace").decode():
            raise SourceError(f"{name}: no manifest can hold this name, of a backslash or no UTF-8; rename the file")


def _told(source: Source, index: str) -> Choice:
    files = source.files()
    if index not in files or not index.endswith((WEIGHTS_ENDING, INDEX_ENDING)):
        known = sorted(name for name in files if name.endswith((WEIGHTS_ENDING, INDEX_ENDING)))
        raise SourceError(
            f"--index {index}: {source.origin.name} has no such index and no such safetensors file; it has "
            f"{named(known) or 'none at all'}"
        )
    choice = Choice((index,)) if index.endswith(WEIGHTS_ENDING) else _indexed(index, read_index(source, index))
    return replace(choice, engines=engines(files))


def _untold(source: Source) -> Choice:
    """By the files' names; config.json may send transformers to others (TRANSFORMERS_KEY)."""
    files, told = source.files(), _told_by_config(source)
    taken = engines(files, told)
    choice = replace(_by_names(source, taken), engines=taken)
    if told is None or told == choice.index or (told,) == choice.files:
        return choice
    there = "" if told in files else ", which this folder does not have"
    other = choice.index or (choice.files[0] if len(choice.files) == 1 else None)
    ways = " or ".join(f"--index {file}" for file in (told, other) if file in files)
    raise SourceError(
        f"{CONFIG}: {TRANSFORMERS_KEY} names {told}{there}: another account of the weights than "
        f"{other or 'the other files'} ({taken}); {f'{_TELL} {ways}' if other else f'take it out of {CONFIG}'}"
    )


def _told_by_config(source: Source) -> str | None:
    """What is wrong in config.json is said where it is read for itself."""
    value = None
    if CONFIG in source.files():
        raw = read_file(source, CONFIG)
        with contextlib.suppress(SourceError):
            value = parse_object(raw, CONFIG).get(TRANSFORMERS_KEY)
    return str(PurePosixPath(str(value))) if value is not None else None


def _by_names(source: Source, taken: str) -> Choice:
    """taken: what the engines take."""
    files = source.files()
    weights = _own(name for name in files if name.endswith(WEIGHTS_ENDING))
    indexes = _own(name for name in files if name.endswith(INDEX_ENDING))
    broken = _own(name for name in source.not_files() if name.endswith((WEIGHTS_ENDING, INDEX_ENDING)))
    for name in broken:
        if name.endswith(INDEX_ENDING) or not (weights or indexes):
            raise SourceError(f"{name} is {source.absent(name)}")
    maps = {name: read_index(source, name) for name in indexes}
    dead = [name for name, weight_map in maps.items() if not set(weight_map.values()) & files.keys()]
    warnings: tuple[str, ...] = ()
    if dead and (len(dead) < len(maps) or weights):
        warnings = tuple(f"{name} names no file that is there; it is passed over" for name in dead)
        maps = {name: weight_map for name, weight_map in maps.items() if name not in dead}
    if len(maps) > 1:
        first, second, *_ = maps
        raise SourceError(f"two indexes, {first} and {second}: {taken}; {_TELL} --index {first} or --index {second}")
    if maps:
        ((index, weight_map),) = maps.items()
        if SINGLE in files and SINGLE not in weight_map.values():
            raise SourceError(
                f"{SINGLE} stands beside {index}, which does not name it: two accounts of the weights "
                f"({taken}); {_TELL} --index {index} or --index {SINGLE}"
            )
        return _indexed(index, weight_map, warnings)
    if not weights:
        raise SourceError(f"{source.origin.name}: holds no safetensors file of a checkpoint{_instead(source)}")
    return Choice(tuple(sorted({*weights, *broken, *missing_numbers(weights)})), warnings=warnings)


def _indexed(index: str, weight_map: Mapping[str, str], warnings: tuple[str, ...] = ()) -> Choice:
    return Choice(tuple(sorted(set(weight_map.values()))), index, weight_map, warnings)


def missing_numbers(files: Iterable[str]) -> list[str]:
    """The files that names such as model-00001-of-00003.safetensors say there are, and that are none of `files`."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file):
            sets.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    missing = []
    for (stem, count), held in sets.items():
        first, digits = (0 if 0 in held else 1), len(next(iter(held.values())))
        expected = (number for number in range(first, first + int(count)) if number not in held)
        missing += [f"{stem}{number:0{digits}d}-of-{count}.safetensors" for number in expected]
    return missing


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
    if UNFINISHED_FOLDER in folders:
        return f"; {UNFINISHED_FOLDER} in it holds unfinished downloads of ModelScope: {_FINISH}"
    if cached := [folder for folder in folders if SNAPSHOTS in folder.split("/")]:
        which = "" if len(cached) == 1 else ", the one of the commit that is meant"
        return f"; it is a Hugging Face cache, with a folder for each commit: give {named(cached)} in it{which}"
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


def why_absent(source: Source, file: str, way: str) -> str:
    """What a file is that is none of the source's, and the way out where it is just missing."""
    absent = source.absent(file)
    return f"{absent}; {unfinished(file, source.files()) or way}" if absent == MISSING else absent


def read_index(source: Source, file: str) -> dict[str, str]:
    """Tensor -> file, each beside the index. Raises SourceError for a path that is not."""
    weight_map = parse_object(read_file(source, file), file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{file}: has no weight_map; put the checkpoint's own index there")
    return {tensor: _beside(file, tensor, name) for tensor, name in weight_map.items()}


def _beside(index: str, tensor: str, name: object) -> str:
    plain = name if isinstance(name, str) else ""
    if "/" in plain:
        plain = str(PurePosixPath(plain))  # without ./
    if plain in {"", ".", ".."} or "/" in plain:
        raise SourceError(
            f"{index} maps {tensor} to {name!r}, which is no file of this folder; put the file, or a link to it, "
            "beside the index, and its name into it"
        )
    return plain
