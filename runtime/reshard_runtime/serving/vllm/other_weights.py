"""What is read of the model's own files: everything but the tensors that the shards replace."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from reshard.errors import ShardError
from reshard.fit import fit_source_file
from reshard.manifest import Manifest, SourceFile
from reshard.model.naming import parse_tensor
from reshard.regular import Opened, unreadable
from reshard.tensors.header import read_raw_header


def replaced(manifests: Iterable[Manifest]) -> frozenset[str]:
    """The source tensors that the sets hold: those they are made of, and those of the same value held once."""
    return frozenset(
        name
        for manifest in manifests
        for shard in manifest.shards
        for tensor in shard.tensors
        for name in (
            *(piece.tensor for piece in tensor.slices),
            *tensor.same_as,
            *(tensor.conversion.inputs if tensor.conversion else ()),
        )
    )


def read_others(
    files: Iterable[str], manifests: Sequence[Manifest], passed_over: Callable[[str], bool], *, same: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor that is in none of the sets. Of the others only the names are read.

    `passed_over`: whether the engine has no use for a tensor (another rank's experts). `same`: the files must be those
    that the sets were cut from. Raises ShardError for a tensor of a part that its set was not cut from, maybe under
    another prefix: it can neither be used nor left out; and for a file that cannot be read, or changed meanwhile.
    """
    held = replaced(manifests)
    cut_from = {file.name: (file, manifest) for manifest in manifests for file in manifest.source.files}
    for file in sorted(files, key=_natural):
        entry = cut_from.get(Path(file).name)
        with (
            _by_name(file),
            Opened(Path(file)) as opened,
            safe_open(opened.same_file, framework="pt") as tensors,
        ):
            if same and entry is not None:
                _compare(opened, entry[0], _way_out(Path(file).parent, entry[1]))
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if same and entry is None and name in held:
                    raise ShardError(
                        f"{file}: holds {name}, which the shard set was cut from {', '.join(cut_from)}: the engine "
                        "reads both; move the one that is not this model's (a draft, an earlier save) elsewhere"
                    )
                if name in held or passed_over(name):
                    continue
                for manifest in manifests:
                    if not _is_of_part(name, tensors, manifest):
                        continue
                    raise ShardError(
                        f"{file}: {name} is a {manifest.what.name} tensor that the shard set was not cut from (its "
                        f"prefix is {manifest.model.prefix}); cut the shards from the very model that is served"
                    )
                yield name, tensors.get_tensor(name)
            if difference := opened.difference():
                raise ShardError(f"{file}: {difference}; start again when nothing writes there any more")


@contextmanager
def _by_name(file: str) -> Iterator[None]:
    """What is wrong with a file, in a line with its name: the engine would show safetensors' own, of a descriptor."""
    way = "copy or download it again"
    try:
        yield
    except SafetensorError as error:
        raise ShardError(f"{file}: is no whole safetensors file ({error}); {way}") from error
    except OSError as error:
        raise ShardError(unreadable(Path(file), error, way)) from error


def _is_of_part(name: str, tensors: Any, manifest: Manifest) -> bool:
    """Whether a tensor is of the set's layers: by its name, or by its size where the prefix is another.

    A tower's MLP may have such a name too, and is of another size, or the checkpoint could not have been cut.
    """
    parsed = parse_tensor(name, manifest.what)
    if parsed is None or parsed.layer not in {layer.index for layer in manifest.layers}:
        return False
    out, in_ = manifest.what.weight_shape(manifest.what.module(parsed.role), manifest.model)
    same_size = tensors.get_slice(name).get_shape() == [out, in_]
    return parsed.prefix == manifest.model.prefix or same_size


def check_same(folder: Path, files: Iterable[str], manifests: Iterable[Manifest]) -> None:
    """Whether the files that the engine reads are those that sets were cut from: by name, size, digest of the header.

    Raises ShardError, naming the first that differs. Sets of several parts are of the same files, looked at once.
    """
    read = {Path(file).name for file in files}
    said = {
        (file.name, file.size, file.header_blake3): (file, manifest)
        for manifest in manifests
        for file in manifest.source.files
    }
    for file, manifest in said.values():
        way = _way_out(folder, manifest)
        path = folder / file.name
        try:
            with Opened(path) as opened:
                _compare(opened, file, way)
        except OSError as error:
            raise ShardError(
                f"{path}: {error.strerror}; the shard set was cut from a file of that name; {way}"
            ) from None
        if file.name not in read:
            raise ShardError(
                f"{path}: the shard set was cut from it, and the engine reads {', '.join(sorted(read))} instead; "
                f"what the set holds would be of one account of the weights, the rest of the other; {way}"
            )


def _way_out(folder: Path, manifest: Manifest) -> str:
    return (
        f'serve {manifest.source.name}, cut the shards from {folder}, or set "source": "any" in '
        "model_loader_extra_config to take the shards as they are"
    )


def _compare(opened: Opened, file: SourceFile, way: str) -> None:
    digest = blake3(read_raw_header(opened.read, str(opened.path), opened.size)).hexdigest()
    for misfit in fit_source_file(SourceFile(name=file.name, size=opened.size, header_blake3=digest), file):
        raise ShardError(f"{opened.path}: {misfit.message}; {way}")


def _natural(file: str) -> list[object]:
    """model-2 before model-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file)]
