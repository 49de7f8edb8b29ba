"""What is read of the model's own files: everything but the tensors that the shards replace."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open

from reshard.errors import ShardError
from reshard.manifest import Manifest
from reshard.naming import parse_dense

_LENGTH_BYTES = 8


def replaced(manifest: Manifest) -> frozenset[str]:
    """The source tensors that the set holds: those it is made of, and those of the same value held once."""
    return frozenset(
        name
        for shard in manifest.shards
        for tensor in shard.tensors
        for name in (
            *(piece.tensor for piece in tensor.slices),
            *tensor.same_as,
            *(tensor.conversion.inputs if tensor.conversion else ()),
        )
    )


def read_others(
    files: Iterable[str], manifest: Manifest, passed_over: Callable[[str], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor that is not in the set. Of the others only the names are read.

    `passed_over`: whether the engine has no use for a tensor (another rank's experts). Raises ShardError for a tensor
    of a dense layer that the set was not cut from: it can neither be used nor left out.
    """
    held, layers = replaced(manifest), {layer.index for layer in manifest.layers}
    for file in sorted(files, key=_natural):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name in held or passed_over(name):
                    continue
                dense = parse_dense(name)
                if dense and dense.prefix == manifest.model.prefix and dense.layer in layers:
                    raise ShardError(
                        f"{file}: {name} is a DenseFFN tensor that the shard set was not cut from; cut the shards "
                        "from the very model that is served"
                    )
                yield name, opened.get_tensor(name)


def check_same(folder: Path, manifest: Manifest) -> None:
    """Whether `folder` holds the files that the set was cut from, by name, size and digest of the header.

    Raises ShardError, naming the first that differs.
    """
    for file in manifest.source.files:
        path = folder / file.name
        way = (
            f'serve {manifest.source.name}, cut the shards from {folder}, or set "source": "any" in '
            "model_loader_extra_config to take the shards as they are"
        )
        try:
            size, digest = path.stat().st_size, _header_digest(path)
        except OSError as error:
            raise ShardError(
                f"{path}: {error.strerror}; the shard set was cut from a file of that name; {way}"
            ) from None
        if size != file.size:
            raise ShardError(f"{path}: {size} bytes, the shard set was cut from {file.size}; {way}")
        if digest != file.header_blake3:
            raise ShardError(
                f"{path}: its header has BLAKE3 {digest[:16]}…, the shard set was cut from {file.header_blake3[:16]}…; "
                f"{way}"
            )


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(_LENGTH_BYTES)
        return blake3(raw + file.read(min(int.from_bytes(raw, "little"), path.stat().st_size))).hexdigest()


def _natural(file: str) -> list[object]:
    """model-2 before model-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file)]
