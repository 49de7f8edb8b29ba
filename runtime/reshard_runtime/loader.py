"""Loading one rank's shard: its own file, the manifest, and what beside them says what the weights are.

What is loaded is what the manifest says, which is recomputed first: sizes, names, shapes and types are compared with
the file's header before any tensor is read, and nothing is narrowed, padded or cast to fit. Tensors are copies: what
becomes of the file later changes nothing.
"""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from blake3 import blake3

from reshard.errors import HeaderError, ManifestError, ReshardError, ShardError
from reshard.fit import fit_digest, fit_header, fit_side_file, fit_size, require
from reshard.limits import JSON_BYTES, MANIFEST_BYTES
from reshard.manifest import LayerEntry, Manifest, parse_manifest
from reshard.manifest import Shard as ShardEntry
from reshard.model.naming import MANIFEST, parse_tensor
from reshard.model.parts import DENSE_FFN
from reshard.plan.recompute import describe_set, needed
from reshard.regular import Opened, is_there, read_whole, unreadable
from reshard.tensors.dtypes import TORCH
from reshard.tensors.header import TensorInfo, read_header
from reshard_runtime.dequantize import dequantized
from reshard_runtime.kernels import device_of, kernels_for
from reshard_runtime.linears import linears_of
from reshard_runtime.shard import LayerShard, Shard

Verify = Literal["header", "digest"]


def load_shard(
    folder: str | Path,
    tp_rank: int,
    device: str | torch.device = "cpu",
    *,
    tp_size: int | None = None,
    layers: Iterable[int] | None = None,
    verify: Verify = "header",
    dequantize: bool = True,
) -> Shard:
    """A rank's tensors on `device`, ready for `DenseFFN`.

    Reads manifest.json, config.json where the set has it, this rank's file. `tp_size`: the group's size, where it is
    known already. `layers`: only these dense layers (each pipeline stage has its own), else all. `verify="digest"`
    compares the BLAKE3 digest of every tensor that is loaded: it alone tells shards of one shape apart, say two
    fine-tunes' of one model.

    FP8 and block-INT8 weights are dequantized to BF16 where the device's backend has no kernel for them; one line of
    the log says so, and what it costs. `dequantize=False` leaves them as they are, for kernels of an engine's own.

    Tensors are copies of the file's bytes, hashed and used in the same memory. A set that is replaced while it is read
    is refused: no shard is taken under another set's manifest.

    Raises ManifestError (no manifest, an unknown version or field), ShardError (a rank, file, tensor, shape, type or
    digest that is not what the manifest says).
    """
    device = device_of(device)
    kernels = kernels_for(device)
    with one_set(Path(folder)) as stored:
        entry = _entry(stored, tp_rank, tp_size)
        read = read_layers(stored, tp_rank, device, tp_size=tp_size, layers=layers, verify=verify)
        found = dequantized(read, kernels) if dequantize else {layer.index: layer for layer in read}
    model = stored.manifest.model
    return Shard(
        entry.file,
        entry.size,
        entry.tp_rank,
        stored.manifest.tp_size,
        model.model_type,
        model.hidden_size,
        DENSE_FFN.shared_size(model),
        stored.digest,
        found,
    )


def load_tensors(
    folder: str | Path,
    tp_rank: int,
    device: str | torch.device = "cpu",
    *,
    tp_size: int | None = None,
    verify: Verify = "header",
) -> dict[str, torch.Tensor]:
    """A rank's tensors by name, of whatever part the set holds, as they are stored: for layers of an engine's own.

    The arguments are those of `load_shard`, and it raises as that does.
    """
    found: dict[str, torch.Tensor] = {}
    with one_set(Path(folder)) as stored:
        for _, tensors in read_tensors(stored, tp_rank, device_of(device), tp_size=tp_size, verify=verify):
            found |= tensors
    return found


class StoredSet(NamedTuple):
    """A shard set's folder, its manifest, and the digest that tells the set."""

    folder: Path
    manifest: Manifest
    digest: str


@contextlib.contextmanager
def one_set(folder: Path) -> Iterator[StoredSet]:
    """The set that is in `folder`, from the first to the last thing that is read of it. Raises ManifestError.

    While a manifest stands, the shards beside it are its own: the writer takes it away before the first shard of
    another set gets its name, and puts the other manifest after the last (`reshard/writer/split.py`). So a shard that
    is opened between two looks at one manifest is of its set. One manifest is one file: held open, so that no other
    gets its inode. Equal bytes would not do, since a set may be replaced and put back. For the second look it is opened
    again, not asked for its status, which a network file system may remember.
    """
    path = folder / MANIFEST
    with contextlib.ExitStack() as held:
        first: Opened | None = None
        with contextlib.suppress(OSError):  # `read_manifest` says what is wrong
            first = held.enter_context(Opened(path))
        manifest, digest = read_manifest(folder)
        yield StoredSet(folder, manifest, digest)
        with contextlib.suppress(OSError), Opened(path) as last:
            if first is not None and last.identity == first.identity:
                return
        raise ManifestError(f"{path}: was replaced while the set was read; load it again")


def read_layers(
    stored: StoredSet,
    tp_rank: int,
    device: torch.device,
    *,
    tp_size: int | None = None,
    layers: Iterable[int] | None = None,
    verify: Verify = "header",
) -> Iterator[LayerShard]:
    """The layers that `load_shard` is asked for, as they are stored, read one at a time. Within `one_set`."""
    folder, manifest, digest = stored
    if manifest.what is not DENSE_FFN:
        raise ShardError(f"{folder}: holds the model's {manifest.part}, not its DenseFFN; load_tensors loads it")
    entry, sizes = _entry(stored, tp_rank, tp_size), manifest.model
    wanted = _wanted_layers(manifest, folder, layers)
    for layer, tensors in read_tensors(stored, tp_rank, device, tp_size=tp_size, layers=wanted, verify=verify):
        first, last = linears_of(manifest, layer, tensors, entry.file)
        yield LayerShard(
            layer.number,
            entry.tp_rank,
            manifest.tp_size,
            sizes.hidden_size,
            DENSE_FFN.shared_size(sizes),
            manifest.share,
            digest,
            first,
            last,
            layer.activation,
        )


def read_tensors(
    stored: StoredSet,
    tp_rank: int,
    device: torch.device,
    *,
    tp_size: int | None = None,
    layers: Container[int | None] | None = None,
    verify: Verify = "header",
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[LayerEntry, dict[str, torch.Tensor]]]:
    """Layer by layer what a rank's file holds of it, by name, as it is stored. Within `one_set`.

    wanted: by name, which of its tensors are read.
    """
    if verify not in ("header", "digest"):
        raise ShardError(f"verify is {verify!r}; it may be 'header' or 'digest'")
    folder, manifest, _ = stored
    entry = _entry(stored, tp_rank, tp_size)
    path = folder / entry.file
    file = str(path)
    try:
        with Opened(path) as opened:
            require(fit_size(file, opened.size, entry.size), ShardError)
            header = read_header(opened.read, file, opened.size)
            require(fit_header(header, entry, manifest, file), ShardError)
            of_layer: dict[int | None, dict[str, str]] = {layer.index: {} for layer in manifest.layers}
            for tensor in entry.tensors:
                parsed = parse_tensor(tensor.name, manifest.what)
                if parsed is not None and wanted(tensor.name):
                    of_layer[parsed.layer][tensor.name] = tensor.blake3
            for layer in manifest.layers:
                if layers is not None and layer.index not in layers:
                    continue
                tensors = {}
                for name, expected in of_layer[layer.index].items():
                    value = _copied(opened, name, header.tensors[name])
                    if verify == "digest":
                        found = blake3(value.view(-1).view(torch.uint8).numpy()).hexdigest()
                        require(fit_digest(f"{path}: {name}", found, expected), ShardError)
                    tensors[name] = value.to(device)
                yield layer, tensors
            if difference := opened.difference():
                raise ShardError(f"{path}: {difference}; load it again when nothing writes there any more")
    except HeaderError as error:
        raise ShardError(str(error)) from error
    except OSError as error:
        raise ShardError(unreadable(path, error, "copy the shard again")) from error


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a shard set, all of it recomputed, and the digest that tells the set. Raises ManifestError."""
    path = folder / MANIFEST
    try:
        raw = read_whole(path, MANIFEST_BYTES)
    except FileNotFoundError as error:
        if is_there(path):  # a broken link
            raise ManifestError(unreadable(path, error)) from None
        what = "the shard set is incomplete: finish it with reshard split --resume" if is_there(folder) else "no folder"
        raise ManifestError(f"{folder}: no {MANIFEST} ({what})") from None
    except OSError as error:
        raise ManifestError(unreadable(path, error)) from error
    manifest = parse_manifest(raw, str(path))
    side_files = _side_files(folder, manifest)
    try:
        describe_set(manifest, side_files)
    except ReshardError as error:
        raise ManifestError(f"{folder}: {error}") from error
    return manifest, manifest.blake3


def _side_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Those that the manifest is held against."""
    wanted, read = set(needed(manifest)), {}
    for file in manifest.files:
        if file.name in wanted:
            path = folder / file.name
            try:
                read[file.name] = read_whole(path, min(file.size, JSON_BYTES))
            except OSError as error:
                raise ManifestError(unreadable(path, error, "copy the whole set")) from error
            require((m._replace(file=str(path)) for m in fit_side_file(file, read[file.name])), ManifestError)
    return read


def _entry(stored: StoredSet, tp_rank: int, tp_size: int | None) -> ShardEntry:
    folder, manifest, _ = stored
    if tp_size is not None and tp_size != manifest.tp_size:
        raise ShardError(
            f"{folder}: cut for tp_size {manifest.tp_size}, the group's size is {tp_size}; cut it again with "
            f"reshard split {folder} OUT --tp {tp_size}"
        )
    if not isinstance(tp_rank, int) or isinstance(tp_rank, bool) or not 0 <= tp_rank < manifest.tp_size:
        raise ShardError(f"{folder}: tp_rank is {tp_rank!r}; the set has ranks 0 to {manifest.tp_size - 1}")
    return manifest.shards[tp_rank]


def _wanted_layers(manifest: Manifest, folder: Path, layers: Iterable[int] | None) -> frozenset[int]:
    held = [layer.number for layer in manifest.layers]
    wanted = frozenset(held if layers is None else layers)
    if not wanted <= set(held):
        missing = ", ".join(map(str, sorted(wanted - set(held))))
        raise ShardError(f"{folder}: it has no layer {missing}, its dense layers are {', '.join(map(str, held))}")
    return wanted


def _copied(opened: Opened, name: str, info: TensorInfo) -> torch.Tensor:
    """A tensor in memory of its own: a map of the file would change with it, and end the process where it is cut."""
    if info.dtype not in TORCH:
        raise ShardError(f"{opened.path}: {name} is {info.dtype}; expected {', '.join(TORCH)}")
    raw = torch.empty(info.stop - info.start, dtype=torch.uint8)
    if opened.fill(memoryview(raw.numpy()), info.start) != len(raw):
        raise ShardError(f"{opened.path}: {name}: the file was cut short while it was read; copy the shard again")
    return raw.view(getattr(torch, TORCH[info.dtype])).reshape(info.shape)
