"""A Hugging Face checkpoint: which files belong to it, and which file holds each tensor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.checkpoint.description import Checkpoint, Identity, Tensor
from reshard.errors import SourceError
from reshard.manifest import SourceFile
from reshard.model.config import read_model_config
from reshard.model.naming import CONFIG, of_part, parse_tensor
from reshard.model.parts import DENSE_FFN, Part
from reshard.quantization import DESCRIPTION, MODELOPT, is_description, read_accounts
from reshard.source.base import Source, read_file, try_headers
from reshard.source.choice import check_names, choose
from reshard.source.compare import Concerns, compare
from reshard.source.partial import describe_what_is_there
from reshard.tensors.header import Header


def read_checkpoint(source: Source, scheme: str | None = None, part: Part = DENSE_FFN) -> Checkpoint:
    """Describe a source of Hugging Face files. Reads the index, the headers and what says how they are quantized.

    Of files that hold no tensor of the part none is needed: what is wrong with them is a warning.

    scheme: what the quantized linears are, where their own accounts do not say it or are wrong (reshard.schemes).
    """
    choice = choose(source)
    side_files, not_read = _side_files(source)
    accounts = replace(read_accounts(side_files), scheme=scheme)
    headers = try_headers(source, [file for file in choice.files if file in source.files()])
    for file, header in headers.items():
        if not isinstance(header, Header) or not any(parse_tensor(name, part) for name in header.tensors):
            source.release(file)
    contents = compare(source, choice, headers, _concerns(accounts.config, part))
    owners = contents.owners
    tensors = {
        name: _tensor(name, file, contents.headers[file]) for name, file in owners.items() if parse_tensor(name, part)
    }
    others = [*(name for name in owners if name not in tensors), *contents.unread]
    model, layers, warnings = describe_what_is_there(source, contents.missing, tensors, others, accounts, part)
    used = {part.file for layer in layers for tensor in layer.tensors() for part in tensor.extents}
    return Checkpoint(
        identity=Identity(
            source.origin.kind,
            source.origin.name,
            source.origin.commit,
            tuple(
                SourceFile(name=name, size=header.file_size, header_blake3=header.digest)
                for name, header in sorted(contents.headers.items())
                if name in used
            ),
        ),
        model=model,
        layers=layers,
        side_files=side_files,
        total_tensors=len(owners),
        total_bytes=sum(header.file_size - header.data_start for header in contents.headers.values()),
        warnings=(*choice.warnings, *contents.warnings, *warnings, *not_read),
    )


def _concerns(config: Mapping[str, Any] | None, part: Part) -> Concerns:
    """Whether a name is that of the part's tensor. An MTP layer's, behind the last layer, is not."""
    layers = read_model_config(config).num_hidden_layers if config is not None else None

    def concerns(name: str) -> bool:
        parsed = parse_tensor(name, part)
        return parsed is not None and (layers is None or parsed.layer is None or parsed.layer < layers)

    return Concerns(of_part(part), concerns)


def _side_files(source: Source) -> tuple[dict[str, bytes], list[str]]:
    """Those that are read, and a line on each that is not: of several descriptions vllm-ascend reads one name alone."""
    there = {*source.files(), *source.not_files()}
    descriptions, unread = sorted(filter(is_description, there)), []
    if DESCRIPTION in descriptions:
        unread, descriptions = [name for name in descriptions if name != DESCRIPTION], [DESCRIPTION]
    if len(descriptions) > 1:
        raise SourceError(
            f"two description files, {descriptions[0]} and {descriptions[1]}; move the one that is not of these "
            "weights to another folder"
        )
    names = [name for name in (CONFIG, MODELOPT, *descriptions) if name in there]
    check_names(names)
    for name in names:
        if name not in source.files():
            raise SourceError(f"{name} is {source.absent(name)}")
    read = {name: read_file(source, name) for name in names}
    lines = [
        f"{name} is not read, and differs from {DESCRIPTION}, which is what vllm-ascend reads"
        for name in unread
        if name not in source.files() or read_file(source, name) != read[DESCRIPTION]
    ]
    return read, lines


def _tensor(name: str, file: str, header: Header) -> Tensor:
    info = header.tensors[name]
    return Tensor(name, info.dtype, info.shape, ()).within(file, info.start)
