"""An index against the files that it names: what it says of other tensors than a part's may be out of date."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from reshard.errors import HeaderError, SourceError
from reshard.source.base import Source
from reshard.source.choice import Choice, named, why_absent
from reshard.source.recognise import unfinished
from reshard.source.weights import SINGLE
from reshard.tensors.dtypes import FLOATS
from reshard.tensors.header import Header

_SCALES = re.compile("scale|offset|zero_point")


@dataclass(frozen=True)
class Concerns:
    """Whether a tensor, by its name, is the part's; `of`: of what, in words."""

    of: str
    is_one: Callable[[str], bool]

    def __call__(self, name: str) -> bool:
        return self.is_one(name)

    def none(self, names: Sequence[str]) -> str:
        """How many others there are, and the first of them."""
        return f"{len(names)}, none {self.of} ({named(names)})"


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
    """Raises SourceError where a tensor of the part is not where it must be, or in two places."""
    headers = {file: header for file, header in found.items() if isinstance(header, Header)}
    owners, warnings = _owners(choice, headers, concerns)
    unread: set[str] = set()
    missing: tuple[str, ...] = ()
    if choice.index is None or choice.weight_map is None:
        for error in found.values():
            if isinstance(error, HeaderError):
                raise error
        missing = tuple(file for file in choice.files if file not in found)
    else:
        casts = [name for name in choice.weight_map if concerns(name) and _is_cast(name, headers, owners)]
        if casts:
            warnings.append(
                f"{choice.index} still names scales {concerns.of} whose weights are not quantized in the files: "
                f"{len(casts)} ({named(casts)}); it is of an earlier, quantized version"
            )
        stale = frozenset(casts)
        weight_map = {name: file for name, file in choice.weight_map.items() if name not in stale}
        lost: dict[str, list[str]] = {}
        for tensor, file in weight_map.items():
            if file not in headers:
                lost.setdefault(file, []).append(tensor)
        warnings += _lost(source, choice.index, lost, found, concerns)
        warnings += _stale(choice.index, weight_map, headers, owners, concerns)
        unread = {tensor for tensors in lost.values() for tensor in tensors}
    for file in {owners[name] for name in owners if concerns(name)}:
        if partial := unfinished(file, source.files()):
            raise SourceError(f"{file}: {partial}")
    return Contents(headers, owners, frozenset(unread), missing, tuple(warnings))


def _owners(choice: Choice, headers: Mapping[str, Header], concerns: Concerns) -> tuple[dict[str, str], list[str]]:
    """The file that holds each tensor; of one that is not the part's, the first of several."""
    owners: dict[str, str] = {}
    twice: list[str] = []
    for file, header in headers.items():
        for name in header.tensors:
            other = owners.setdefault(name, file)
            if other != file and concerns(name):
                raise SourceError(f"{name}: in two files, {_two(choice, headers, other, file, '')}")
            if other != file:
                twice.append(name)
    if choice.index is None and SINGLE in headers:
        for name, file in owners.items():
            if file != SINGLE and concerns(name):
                both = _two(choice, headers, SINGLE, file, " are one model")
                raise SourceError(f"{name}: in {file}, and no index says that {both}")
    return owners, [f"tensors in two files: {concerns.none(twice)}"] if twice else []


def _two(choice: Choice, headers: Mapping[str, Header], one: str, other: str, what: str) -> str:
    """Two files, what the engines take of them, and the way out."""
    both = " and ".join(f"{file} ({len(headers[file].tensors)} tensors)" for file in (one, other)) + what
    if choice.index is not None:
        return f"{both}, both of {choice.index}; put the files of one version there"
    alone = f"take {SINGLE} alone with --index {SINGLE}, or " if SINGLE in (one, other) else ""
    return (
        f"{both}: {choice.engines}; {alone}move the file that is not this model's (a draft, an earlier save) to "
        "another folder"
    )


def _lost(
    source: Source,
    index: str,
    lost: Mapping[str, list[str]],
    found: Mapping[str, Header | HeaderError],
    concerns: Concerns,
) -> Iterable[str]:
    """Files that the index names and that are not there, or no safetensors files (a download that is not complete)."""
    absent: list[str] = []
    broken: list[str] = []
    for file in sorted(lost):
        error = found.get(file)
        needed = next(filter(concerns, lost[file]), None)
        if needed is not None and isinstance(error, HeaderError):
            raise error
        if needed is not None:
            why = why_absent(source, file, "download it, or copy it again")
            raise SourceError(f"{index} maps {needed} to {file}, which is {why}")
        (absent if error is None else broken).append(file)

    def counted(files: list[str]) -> str:
        return f"with {sum(len(lost[file]) for file in files)} tensors, none {concerns.of}"

    if absent:
        yield f"{index} names files that are not there: {len(absent)} ({named(absent)}), {counted(absent)}"
    if broken:
        yield f"files that cannot be read: {len(broken)}, {counted(broken)} ({found[broken[0]]})"


def _stale(
    index: str,
    weight_map: Mapping[str, str],
    headers: Mapping[str, Header],
    owners: Mapping[str, str],
    concerns: Concerns,
) -> Iterable[str]:
    """Entries that the files do not bear out, and tensors that the index leaves out."""
    wrong = [name for name, file in weight_map.items() if file in headers and name not in headers[file].tensors]
    for name in filter(concerns, wrong):
        where = f"{owners[name]} holds it" if name in owners else "no file holds it"
        raise SourceError(
            f"{index} maps {name} to {weight_map[name]}, whose header lacks it; {where}: put the index of these files "
            "there, or the files of this index"
        )
    for name, holder in owners.items():
        if name not in weight_map and concerns(name):
            raise SourceError(f"{name}: is in {holder}, and {index} does not name it; is the index of these files?")
    if gone := [name for name in wrong if name not in owners]:
        yield f"{index} names tensors that no file holds: {concerns.none(gone)}"
    if moved := [name for name in wrong if name in owners]:
        yield f"{index} names tensors in the wrong file: {concerns.none(moved)}"


def _is_cast(name: str, headers: Mapping[str, Header], owners: Mapping[str, str]) -> bool:
    """Whether a tensor that no file holds was a scale, of a weight that is in floating point now."""
    module, _, suffix = name.rpartition(".")
    weight = f"{module}.weight"
    is_gone = bool(_SCALES.search(suffix)) and name not in owners
    return is_gone and weight in owners and headers[owners[weight]].tensors[weight].dtype in FLOATS
