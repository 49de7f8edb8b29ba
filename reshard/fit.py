"""Whether files fit their manifest: the rules for check, verify, merge, re-cuts, the loader and the vLLM plugin."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from blake3 import blake3

from reshard.errors import ReshardError
from reshard.manifest import Manifest, Shard, SideFile, SourceFile
from reshard.model.naming import MANIFEST, ShardName, parse_shard_file
from reshard.regular import MISSING
from reshard.tensors.dtypes import nbytes
from reshard.tensors.header import Header


class Misfit(NamedTuple):
    """Where a file is not what the manifest says, and the way out."""

    rule: Literal["file", "size", "header", "digest", "layers", "shapes", "scheme", "cut"]
    file: str
    message: str


def require(misfits: Iterable[Misfit], error: type[ReshardError]) -> None:
    """Raises the first misfit, if there is one."""
    for misfit in misfits:
        raise error(f"{misfit.file}: {misfit.message}")


def fit_files(
    manifest: Manifest, sizes: Mapping[str, int], absent: Callable[[str], str] = lambda file: MISSING
) -> Iterator[Misfit]:
    """Every file that the manifest names is there, in its size. absent: what stands in a missing file's place."""
    named = [(shard.file, shard.size) for shard in manifest.shards]
    named += [(file.name, file.size) for file in manifest.files]
    for file, size in named:
        if file in sizes:
            yield from fit_size(file, sizes[file], size)
        else:
            what = absent(file)
            way = "; copy the whole set" if what == MISSING else ""
            yield Misfit("file", file, f"{MANIFEST} names it and it is {what}{way}")


def fit_names(manifest: Manifest, files: Collection[str]) -> Iterator[Misfit]:
    """No other shard is there."""
    named = {shard.file for shard in manifest.shards}
    for file in sorted(files):
        if parse_shard_file(file) and file not in named:
            yield Misfit("file", file, f"a shard that {MANIFEST} does not name; is it of another set?")


def absent_parts(folder: str, manifests: Sequence[Manifest]) -> str | None:
    """What is said of sets that were cut together with those that a folder holds, and are not among them, if any."""
    held = {manifest.part: manifest.tp_size for manifest in manifests}
    absent = {part: manifest.part for manifest in manifests for part in manifest.parts if part not in held}
    if not absent:
        return None
    parts, teller = ", ".join(absent), next(iter(absent.values()))
    again = " ".join(f"--part {part}={size}" for part, size in held.items())
    return (
        f"{folder}: lacks {parts}, cut together with {teller} (its {MANIFEST} says so): copy the whole folder, or cut "
        f"what is wanted of it anew: reshard split {folder} OUT {again}"
    )


def fit_size(file: str, size: int, expected: int) -> Iterator[Misfit]:
    """A file's size."""
    if size != expected:
        yield Misfit("size", file, f"{size} bytes, {MANIFEST} says {expected}; copy it again")


def fit_side_file(file: SideFile, data: bytes) -> Iterator[Misfit]:
    """The bytes of a file that was copied beside the shards."""
    yield from fit_size(file.name, len(data), file.size)
    yield from (m._replace(rule="file") for m in fit_digest(file.name, blake3(data).hexdigest(), file.blake3))


def fit_source_file(found: SourceFile, cut_from: SourceFile) -> Iterator[Misfit]:
    """A file at hand is the one that the set was cut from, by its size and its header."""
    if found != cut_from:
        was, now = (f"{file.size} bytes with header {file.header_blake3}" for file in (cut_from, found))
        yield Misfit("header", found.name, f"the shard set was cut from {was}, this file has {now}")


def fit_digest(file: str, digest: str, expected: str) -> Iterator[Misfit]:
    """A file's BLAKE3, or a tensor's: `FILE: TENSOR`."""
    if digest != expected:
        yield Misfit("digest", file, f"BLAKE3 is {digest}, {MANIFEST} says {expected}; copy it again")


def fit_header(header: Header, shard: Shard, manifest: Manifest, file: str = "") -> Iterator[Misfit]:
    """A shard's header: its rank; its tensors' names, types, shapes and places. file: what to call it if not so."""
    yield from fit_rank(header, shard, manifest, file)
    yield from fit_tensors(header, shard, file)


def fit_rank(header: Header, shard: Shard, manifest: Manifest, file: str = "") -> Iterator[Misfit]:
    """Whose shard a header says that it is."""
    for key, value in ShardName(manifest.part, shard.tp_rank, manifest.tp_size).metadata.items():
        if (found := header.metadata.get(key)) != value:
            line = f"its header says {key} {found!r}, {MANIFEST} says {value!r}; copy it again"
            yield Misfit("header", file or shard.file, line)


def fit_tensors(header: Header, shard: Shard, file: str = "") -> Iterator[Misfit]:
    """The names, types and shapes of a shard's tensors; then their places: they lie in the manifest's order."""
    expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
    lines = []
    for name in sorted(expected.keys() | header.tensors.keys()):
        info = header.tensors.get(name)
        if info is None:
            lines.append(f"{name}: {MANIFEST} names it, the file lacks it")
        elif name not in expected:
            lines.append(f"{name}: the file has it, {MANIFEST} does not name it")
        elif (info.dtype, info.shape) != expected[name]:
            dtype, shape = expected[name]
            lines.append(f"{name}: is {info.dtype} {list(info.shape)}, {MANIFEST} says {dtype} {list(shape)}")
    if not lines:
        start = header.data_start
        for name, each in expected.items():
            if (found := header.tensors[name].start) != start:
                lines.append(f"{name}: begins at byte {found}, expected {start}")
            start += nbytes(*each)
    for line in lines:
        yield Misfit("header", file or shard.file, f"{line}; copy the shard again")
