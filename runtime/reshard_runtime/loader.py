"""Loading one rank's shard: its own file and the manifest, nothing else.

What is loaded is what the manifest says: version, sizes, names, shapes and types are compared with the file's header
before any tensor is read, and nothing is narrowed, padded or cast to fit.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from reshard.errors import HeaderError, ManifestError, ReshardError, ShardError
from reshard.fit import fit_digest, fit_header, fit_side_file, fit_size, require, share_of
from reshard.limits import JSON_BYTES, MANIFEST_BYTES
from reshard.manifest import Manifest, parse_manifest
from reshard.manifest import Shard as ShardEntry
from reshard.model.naming import MANIFEST, module_name, parse_dense
from reshard.model.parts import DENSE_FFN
from reshard.plan.recompute import describe_set, needed
from reshard.regular import Opened, read_whole, unreadable
from reshard.tensors.header import read_header
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

    Reads manifest.json and this rank's file. `tp_size`: the group's size, where it is known already. `layers`: only
    these dense layers (each pipeline stage has its own), else all. `verify="digest"` compares the BLAKE3 digest of
    every tensor that is loaded: it alone tells shards of one shape apart, say two fine-tunes' of one model.

    FP8 and block-INT8 weights are dequantized to BF16 where the device's backend has no kernel for them; one line of
    the log says so, and what it costs. `dequantize=False` leaves them as they are, for kernels of an engine's own.

    On the CPU, tensors are maps of the file: pages come in as they are used, and shared with other processes. The
    writer replaces files by renaming, so a set that is written again does not change what is loaded.

    Raises ManifestError (no manifest, an unknown version or field), ShardError (a rank, file, tensor, shape, type or
    digest that is not what the manifest says).
    """
    if verify not in ("header", "digest"):
        raise ShardError(f"verify is {verify!r}; it may be 'header' or 'digest'")
    folder, device = Path(folder), device_of(device)
    kernels = kernels_for(device)
    manifest, set_digest = read_manifest(folder)
    entry = _entry(manifest, folder, tp_rank, tp_size)
    wanted = _wanted_layers(manifest, folder, layers)
    tensors = _read(folder / entry.file, entry, manifest, device, wanted, verify)
    share = share_of(manifest)
    found = {
        layer.index: LayerShard(
            layer.index,
            entry.tp_rank,
            manifest.tp_size,
            manifest.model.hidden_size,
            DENSE_FFN.shared_size(manifest.model),
            share,
            set_digest,
            *linears_of(module_name(manifest.model.prefix, layer.index), layer, tensors, entry.file),
            layer.activation,
        )
        for layer in manifest.layers
        if layer.index in wanted
    }
    return Shard(
        entry.file,
        entry.size,
        entry.tp_rank,
        manifest.tp_size,
        manifest.model.model_type,
        manifest.model.hidden_size,
        DENSE_FFN.shared_size(manifest.model),
        set_digest,
        dequantized(found, kernels) if dequantize else found,
    )


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a shard set, all of it recomputed, and the digest that tells the set. Raises ManifestError."""
    path = folder / MANIFEST
    try:
        raw = read_whole(path, MANIFEST_BYTES)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ManifestError(unreadable(path, error)) from None
        what = "the shard set is incomplete: finish it with reshard split --resume" if folder.is_dir() else "no folder"
        raise ManifestError(f"{folder}: no {MANIFEST} ({what})") from None
    except OSError as error:
        raise ManifestError(unreadable(path, error)) from error
    manifest = parse_manifest(raw, str(path))
    try:
        describe_set(manifest, _side_files(folder, manifest))
    except ReshardError as error:
        raise ManifestError(f"{folder}: {error}") from error
    return manifest, manifest.blake3


def _side_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Those that the manifest is held against."""
    wanted, read = set(needed(manifest)), {}
    for file in manifest.files:
        if file.name in wanted:
            try:
                read[file.name] = read_whole(folder / file.name, min(file.size, JSON_BYTES))
            except OSError as error:
                raise ManifestError(unreadable(Path(file.name), error, "copy the whole set")) from error
            require(fit_side_file(file, read[file.name]), ManifestError)
    return read


def _entry(manifest: Manifest, folder: Path, tp_rank: int, tp_size: int | None) -> ShardEntry:
    if tp_size is not None and tp_size != manifest.tp_size:
        raise ShardError(
            f"{folder}: cut for tp_size {manifest.tp_size}, the group's size is {tp_size}; cut it again with "
            f"reshard split {folder} OUT --tp {tp_size}"
        )
    if not isinstance(tp_rank, int) or isinstance(tp_rank, bool) or not 0 <= tp_rank < manifest.tp_size:
        raise ShardError(f"{folder}: tp_rank is {tp_rank!r}; the set has ranks 0 to {manifest.tp_size - 1}")
    return manifest.shards[tp_rank]


def _wanted_layers(manifest: Manifest, folder: Path, layers: Iterable[int] | None) -> frozenset[int]:
    held = [layer.index for layer in manifest.layers]
    wanted = frozenset(held if layers is None else layers)
    if not wanted <= set(held):
        missing = ", ".join(map(str, sorted(wanted - set(held))))
        raise ShardError(f"{folder}: it has no layer {missing}, its dense layers are {', '.join(map(str, held))}")
    return wanted


def _read(
    path: Path, entry: ShardEntry, manifest: Manifest, device: torch.device, layers: frozenset[int], verify: Verify
) -> dict[str, torch.Tensor]:
    """The tensors of `layers`, after the file was compared with the manifest."""
    file = str(path)
    first = torch.device("cpu") if verify == "digest" else device
    tensors: dict[str, torch.Tensor] = {}
    try:
        with Opened(path) as opened:
            require(fit_size(file, opened.size, entry.size), ShardError)
            header = read_header(opened.read, file, opened.size)
            require(fit_header(header, entry, manifest.tp_size, file), ShardError)
            with safe_open(opened.same_file, framework="pt", device=str(first)) as stored:
                for tensor in entry.tensors:
                    parsed = parse_dense(tensor.name)
                    if parsed is None or parsed.layer not in layers:
                        continue
                    value = stored.get_tensor(tensor.name)
                    if verify == "digest":
                        digest = blake3(value.reshape(-1).view(torch.uint8).numpy()).hexdigest()
                        require(fit_digest(f"{path}: {tensor.name}", digest, tensor.blake3), ShardError)
                    tensors[tensor.name] = value.to(device)
            if difference := opened.difference():
                raise ShardError(f"{path}: {difference}; load it again when nothing writes there any more")
    except HeaderError as error:
        raise ShardError(str(error)) from error
    except SafetensorError as error:
        raise ShardError(f"{path}: cannot be read: {error}; copy the shard again") from error
    except OSError as error:
        raise ShardError(unreadable(path, error, "copy the shard again")) from error
    return tensors
