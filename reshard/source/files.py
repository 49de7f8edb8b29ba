"""A Hugging Face checkpoint: which files belong to it, and which file holds each tensor."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reshard.checkpoint import Checkpoint, Identity, Part, SourceFile, Tensor, describe_layers
from reshard.errors import SourceError
from reshard.modelconfig import read_model_config
from reshard.naming import CONFIG, parse_dense
from reshard.source.base import Source, parse_json_object, read_file, try_headers
from reshard.source.choice import choose
from reshard.source.compare import compare
from reshard.source.header import Header

_DESCRIPTION = "quant_model_description"


def read_checkpoint(source: Source) -> Checkpoint:
    """Describe a source of Hugging Face files. Reads the index, the headers, config.json and the description.

    Of files that hold no DenseFFN tensor none is needed: what is wrong with them is a warning.
    """
    choice = choose(source)
    side_files = _side_files(source)
    config, description = read_accounts(side_files)
    concerns = _concerns(config)
    headers = try_headers(source, [file for file in choice.files if file in source.files()])
    for file, header in headers.items():
        if not isinstance(header, Header) or not any(map(parse_dense, header.tensors)):
            source.release(file)
    contents = compare(source, choice, headers, concerns)
    owners = contents.owners
    tensors = {name: _tensor(name, file, contents.headers[file]) for name, file in owners.items() if parse_dense(name)}
    others = [*(name for name in owners if name not in tensors), *contents.unread]
    model, layers, warnings = describe_layers(tensors, others, config, description)
    used = {part.file for layer in layers for tensor in layer.tensors() for part in tensor.parts}
    return Checkpoint(
        identity=Identity(
            source.origin.kind,
            source.origin.name,
            source.origin.commit,
            tuple(_source_file(name, contents.headers[name]) for name in sorted(used)),
        ),
        model=model,
        layers=layers,
        side_files=side_files,
        total_tensors=len(owners),
        total_bytes=sum(header.file_size - header.data_start for header in contents.headers.values()),
        warnings=(*choice.warnings, *contents.warnings, *warnings),
    )


def _source_file(name: str, header: Header) -> SourceFile:
    return SourceFile(name, header.file_size, header.digest)


def _concerns(config: Mapping[str, Any] | None) -> Callable[[str], bool]:
    """Whether a name is a DenseFFN tensor's. A prediction block's, behind the last layer, is not."""
    layers = read_model_config(config).num_hidden_layers if config is not None else None

    def concerns(name: str) -> bool:
        parsed = parse_dense(name)
        return parsed is not None and (layers is None or parsed[0] < layers)

    return concerns


def read_accounts(
    side_files: Mapping[str, bytes],
) -> tuple[dict[str, Any] | None, tuple[str, dict[str, Any]] | None]:
    """config.json, and the description with its file's name: each where it is there."""
    config = parse_json_object(side_files[CONFIG], CONFIG) if CONFIG in side_files else None
    file = next((name for name in side_files if is_description(name)), None)
    return config, (file, parse_json_object(side_files[file], file)) if file else None


def is_description(name: str) -> bool:
    """Whether a file is ModelSlim's account of each tensor's type."""
    return name.startswith(_DESCRIPTION) and name.endswith(".json")


def _only_one(files: Iterable[str], wanted: Callable[[str], bool], what: str) -> str | None:
    found = sorted(name for name in files if wanted(name))
    if len(found) > 1:
        raise SourceError(
            f"two {what} files, {found[0]} and {found[1]}; move the one that is not of these weights to another folder"
        )
    return found[0] if found else None


def _side_files(source: Source) -> dict[str, bytes]:
    description = _only_one(source.files(), is_description, "description")
    wanted = [CONFIG] if CONFIG in source.files() else []
    return {name: read_file(source, name) for name in [*wanted, *([description] if description else [])]}


def _tensor(name: str, file: str, header: Header) -> Tensor:
    info = header.tensors[name]
    tensor = Tensor(name, info.dtype, info.shape, ())
    whole = Part(file, info.start, tensor.row_bytes, 0, 0, tensor.rows, tensor.row_bytes)
    return Tensor(name, info.dtype, info.shape, (whole,))
