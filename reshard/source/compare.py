"""An index against the files that it names: what it says of other tensors than DenseFFN's may be out of date."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from reshard.errors import HeaderError, SourceError
from reshard.source.base import MISSING, Source
from reshard.source.choice import Choice, named
from reshard.source.recognise import unfinished
from reshard.source.weights import SINGLE, engines
from reshard.tensors.dtypes import FLOATS
from reshard.tensors.header import Header

_SCALES = re.compile("scale|offset|zero_point")

Concerns = Callable[[str], bool]
"""Whether a tensor, by its name, is of a dense layer."""


@dataclass(frozen=True)
class Contents:
    """What the weights' files hold: the headers, which file each tensor is in, what else the index names.

    missing: files that are not there and that no index accounts for.
    """

    headers: Mapping[str, Header]
    owners: Mapping[str, str]
    unread: frozenset[str]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]


def compare(source: Source, choice: Choice, found: Mapping[str, Header | HeaderError], concerns: Concerns) -> Contents:
    """Raises SourceError where a tensor of a dense layer is not where it must be, or in two places."""
    broken = {file: header for file, header in found.items() if isinstance(header, HeaderError)}
    headers = {file: header for file, header in found.items() if isinstance(header, Header)}
    owners, warnings = _owners(source, choice, headers, concerns)
    unread: set[str] = set()
    missing: tuple[str, ...] = ()
    if choice.index is None or choice.weight_map is None:
        for error in broken.values():
            raise error
        missing = tuple(file for file in choice.files if file not in found)
    else:
        casts = [name for name in choice.weight_map if concerns(name) and _is_cast(name, headers, owners)]
        if casts:
            warnings.append(
                f"{choice.index} still names scales of dense layers whose weights are not quantized in the files: "
                f"{len(casts)} ({named(casts)}); it is of an earlier, quantized version"
            )
        stale = frozenset(casts)
        weight_map = {name: file for name, file in choice.weight_map.items() if name not in stale}
        by_file: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            by_file.setdefault(file, []).append(tensor)
        lost = {file: by_file[file] for file in sorted(by_file) if file not in headers}
        warnings += _lost(source, choice.index, lost, broken, concerns)
        warnings += _stale(choice.index, weight_map, headers, owners, concerns)
        unread = {tensor for tensors in lost.values() for tensor in tensors}
    for file in {owners[name] for name in owners if concerns(name)}:
        if partial := unfinished(file, source.files()):
            raise SourceError(f"{file}: {partial}")
    return Contents(headers, owners, frozenset(unread), missing, tuple(warnings))


def _owners(
    source: Source, choice: Choice, headers: Mapping[str, Header], concerns: Concerns
) -> tuple[dict[str, str], list[str]]:
    """The file that holds each tensor; of one that concerns no dense layer, the first of several."""
    owners: dict[str, str] = {}
    twice: list[str] = []
    for file, header in headers.items():
        for name in header.tensors:
            other = owners.setdefault(name, file)
            if other == file:
                continue
            if concerns(name):
                both = _both(headers, other, file)
                raise SourceError(f"{name}: in two files, {both}{_of_two(source, choice, other, file)}")
            twice.append(name)
    if choice.index is None and SINGLE in headers:
        for file, header in headers.items():
            more = next((name for name in header.tensors if file != SINGLE and concerns(name)), None)
            if more is not None:
                both = f"{_both(headers, SINGLE, file)} are one model"
                way = _of_two(source, choice, SINGLE, file)
                raise SourceError(f"{more}: in {file}, and no index says that {both}{way}")
    told = f"tensors in two files: {len(twice)}, none of a dense layer ({named(twice)})"
    return owners, [told] if twice else []


def _both(headers: Mapping[str, Header], *files: str) -> str:
    return " and ".join(f"{file} ({len(headers[file].tensors)} tensors)" for file in files)


def _of_two(source: Source, choice: Choice, one: str, other: str) -> str:
    """Which of two files the engines take, and the way out."""
    if choice.index is not None:
        return f", both of {choice.index}; put the files of one version there"
    alone = f"take {SINGLE} alone with --index {SINGLE}, or " if SINGLE in (one, other) else ""
    return (
        f": {engines(source.files(), choice.told)}; {alone}move the file that is not this model's (a draft, an earlier "
        "save) to another folder"
    )


def _lost(
    source: Source,
    index: str,
    lost: Mapping[str, list[str]],
    broken: Mapping[str, HeaderError],
    concerns: Concerns,
) -> Iterable[str]:
    """Files that the index names and that are not there, or no safetensors files (a download that is not complete)."""
    for file, tensors in lost.items():
        wanted = next((name for name in tensors if concerns(name)), None)
        if wanted is not None and file in broken:
            raise broken[file]
        if wanted is not None:
            absent = source.absent(file)
            way = unfinished(file, source.files()) or "download it, or copy it again"
            raise SourceError(
                f"{index}: {wanted} is said to be in {file}, which is {absent}{f'; {way}' if absent == MISSING else ''}"
            )
    absent_files = [file for file in lost if file not in broken]
    if absent_files:
        count = sum(len(lost[file]) for file in absent_files)
        yield (
            f"{index} names files that are not there: {len(absent_files)} ({named(absent_files)}), with {count} "
            "tensors, none of a dense layer"
        )
    unreadable = [file for file in lost if file in broken]
    if unreadable:
        count = sum(len(lost[file]) for file in unreadable)
        first = broken[unreadable[0]]
        yield f"files that cannot be read: {len(unreadable)}, with {count} tensors, none of a dense layer ({first})"


def _stale(
    index: str,
    weight_map: Mapping[str, str],
    headers: Mapping[str, Header],
    owners: Mapping[str, str],
    concerns: Concerns,
) -> Iterable[str]:
    """Entries that the files do not bear out, and tensors that the index leaves out."""
    gone: list[str] = []
    moved: list[str] = []
    for name, holder in weight_map.items():
        if holder not in headers or name in headers[holder].tensors:
            continue
        found = owners.get(name)
        if not concerns(name):
            (moved if found else gone).append(name)
        else:
            where = f"{found} holds it" if found else "no file holds it"
            raise SourceError(
                f"{index}: {name} is said to be in {holder}, whose header lacks it; {where}: put the index of these "
                "files there, or the files of this index"
            )
    for name, holder in owners.items():
        if name not in weight_map and concerns(name):
            raise SourceError(f"{name}: stands in {holder}, and {index} does not name it; is the index of these files?")
    if gone:
        yield f"{index} names tensors that no file holds: {len(gone)}, none of a dense layer ({named(gone)})"
    if moved:
        yield f"{index} names tensors in the wrong file: {len(moved)}, none of a dense layer ({named(moved)})"


def _is_cast(name: str, headers: Mapping[str, Header], owners: Mapping[str, str]) -> bool:
    """Whether a tensor that no file holds was a scale, of a weight that is in floating point now."""
    module, _, suffix = name.rpartition(".")
    weight = f"{module}.weight"
    is_gone = bool(_SCALES.search(suffix)) and name not in owners
    return is_gone and weight in owners and headers[owners[weight]].tensors[weight].dtype in FLOATS
