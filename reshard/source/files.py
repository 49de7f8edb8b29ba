"""A Hugging Face checkpoint: which files belong to it, and which file holds each tensor."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath

from reshard.checkpoint import Checkpoint, Identity, Part, SourceFile, Tensor
from reshard.describe import describe_layers
from reshard.errors import SourceError
from reshard.naming import CONFIG, parse_dense
from reshard.quantization import Accounts
from reshard.quantization.description import DESCRIPTION, is_description
from reshard.quantization.modelopt import FILE as MODELOPT
from reshard.source.base import Source, parse_json_object, read_file, read_headers
from reshard.source.header import Header

_INDEX = ".safetensors.index.json"
_WEIGHTS = ".safetensors"


def read_checkpoint(source: Source, scheme: str | None = None) -> Checkpoint:
    """Describe a source of Hugging Face files. Reads the index, the headers and what says how they are quantised.

    scheme: what the quantised linears are, where their own accounts do not say it or are wrong (reshard.schemes).
    """
    index_file = _only_one(source.files(), _is_index, "index")
    index = _read_index(source, index_file) if index_file else None
    names = sorted(set(index.values())) if index is not None else [f for f in sorted(source.files()) if _is_weights(f)]
    if not names:
        raise SourceError(f"{source.origin.name}: holds no safetensors file; give the folder that has the checkpoint's")
    headers = read_headers(source, names)
    owners = _owners(headers)
    if index_file and index is not None:
        _check_index(index_file, index, headers, owners)
    tensors = {name: _tensor(name, file, headers[file]) for name, file in owners.items() if parse_dense(name)}
    side_files, unread = _side_files(source)
    others = (name for name in owners if name not in tensors)
    accounts = replace(read_accounts(side_files), scheme=scheme)
    model, layers, warnings = describe_layers(tensors, others, accounts)
    used = {part.file for layer in layers for tensor in layer.tensors() for part in tensor.parts}
    return Checkpoint(
        identity=Identity(
            source.origin.kind,
            source.origin.name,
            source.origin.commit,
            tuple(SourceFile(name, headers[name].file_size, headers[name].digest) for name in sorted(used)),
        ),
        model=model,
        layers=layers,
        side_files=side_files,
        total_tensors=len(owners),
        total_bytes=sum(header.file_size - header.data_start for header in headers.values()),
        warnings=(*warnings, *unread),
    )


def _is_index(name: str) -> bool:
    return name.endswith(_INDEX)


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)


def read_accounts(side_files: Mapping[str, bytes]) -> Accounts:
    """What the files that go with a set say of the weights."""
    read = {name: parse_json_object(raw, name) for name, raw in side_files.items()}
    description = next(((name, content) for name, content in read.items() if is_description(name)), None)
    return Accounts(read.get(CONFIG), description, read.get(MODELOPT))


def is_side_file(name: str) -> bool:
    """Whether a file says what a checkpoint's weights are, and goes with every set that is cut from it."""
    return name in {CONFIG, MODELOPT} or is_description(name)


def _only_one(files: Iterable[str], wanted: Callable[[str], bool], what: str) -> str | None:
    found = sorted(name for name in files if wanted(name))
    if len(found) > 1:
        raise SourceError(f"two {what} files, {found[0]} and {found[1]}; keep the one that belongs to the weights")
    return found[0] if found else None


def _side_files(source: Source) -> tuple[dict[str, bytes], list[str]]:
    """Those that are read, and a line on each that is not: of several descriptions vllm-ascend reads one name alone."""
    descriptions = sorted(filter(is_description, source.files()))
    unread = [name for name in descriptions if name != DESCRIPTION] if DESCRIPTION in descriptions else []
    description = _only_one((name for name in descriptions if name not in unread), is_description, "description")
    wanted = [*(name for name in (CONFIG, MODELOPT) if name in source.files()), *([description] if description else [])]
    read = {name: read_file(source, name) for name in wanted}
    lines = [
        f"{name} is not read, and differs from {DESCRIPTION}, which is what vllm-ascend reads"
        for name in unread
        if read_file(source, name) != read[DESCRIPTION]
    ]
    return read, lines


def _read_index(source: Source, file: str) -> dict[str, str]:
    weight_map = parse_json_object(read_file(source, file), file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{file}: has no weight_map; copy or download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePath(name).name != name or name in {"", ".", ".."}:
            raise SourceError(
                f"{file}: {tensor} is said to be in {name!r}, which is no file of this folder; put the file beside the "
                "index, and its name into it"
            )
        if name not in source.files():
            raise SourceError(f"{file}: {tensor} is said to be in {name}, which is missing; download it again")
    return weight_map


def _owners(headers: Mapping[str, Header]) -> dict[str, str]:
    owners: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            other = owners.setdefault(name, file)
            if other != file:
                raise SourceError(f"{name}: stands in two files, {other} and {file}; remove the one that is stale")
    return owners


def _check_index(file: str, index: Mapping[str, str], headers: Mapping[str, Header], owners: Mapping[str, str]) -> None:
    for name, holder in index.items():
        if name not in headers[holder].tensors:
            found = owners.get(name)
            where = f"{found} holds it" if found else "no file holds it"
            raise SourceError(
                f"{file}: {name} is said to be in {holder}, whose header lacks it; {where}: copy or download both again"
            )
    for name, holder in owners.items():
        if name not in index and parse_dense(name):
            raise SourceError(f"{name}: stands in {holder}, and {file} does not name it; is the index of these files?")


def _tensor(name: str, file: str, header: Header) -> Tensor:
    info = header.tensors[name]
    tensor = Tensor(name, info.dtype, info.shape, ())
    whole = Part(file, info.start, tensor.row_bytes, 0, 0, tensor.rows, tensor.row_bytes)
    return Tensor(name, info.dtype, info.shape, (whole,))
