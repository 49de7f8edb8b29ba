"""A shard set read as a checkpoint: the Hugging Face tensors that its manifest's slices put together again."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from reshard.checkpoint.describe import describe_layers
from reshard.checkpoint.description import Checkpoint, Extent, Identity, Layer, Tensor
from reshard.errors import ManifestError, SourceError
from reshard.fit import fit_files, fit_side_file, fit_tensors, require
from reshard.limits import MANIFEST_BYTES
from reshard.manifest import Conversion, Manifest, ShardTensor, SideFile, Slice, parse_manifest
from reshard.model.naming import CONFIG, MANIFEST, module_name, parse_shard_file
from reshard.model.parts import DENSE_FFN
from reshard.quantization import Recorded
from reshard.source.base import Source, read_file, read_headers
from reshard.source.files import read_accounts
from reshard.tensors.dtypes import itemsize
from reshard.tensors.header import TensorInfo


def is_shard_set(source: Source) -> bool:
    """Whether a source holds shards and the manifest that completes them."""
    return MANIFEST in source.files() and any(parse_shard_file(name) for name in source.files())


def require_shard_set(source: Source) -> None:
    """Raises ManifestError where there are no shards, or shards without their manifest."""
    if any(parse_shard_file(name) for name in source.files()):
        if MANIFEST in source.files():
            return
        if MANIFEST in source.not_files():
            raise ManifestError(f"{MANIFEST} is {source.absent(MANIFEST)}")
        raise ManifestError(
            f"{source.origin.name}: holds shards and no {MANIFEST}: the set is incomplete; "
            "finish it with the same `reshard split … --resume`"
        )
    raise ManifestError(f"{source.origin.name}: is no shard set: it holds no denseffn-rank-….safetensors")


def read_manifest_only(source: Source) -> Manifest:
    """The set's manifest, whatever its files are."""
    return parse_manifest(read_file(source, MANIFEST, MANIFEST_BYTES))


def read_manifest(source: Source) -> Manifest:
    """The set's manifest, its files there in the sizes it names."""
    manifest = read_manifest_only(source)
    require(fit_files(manifest, source.files(), source.absent), SourceError)
    return manifest


def read_shard_set(source: Source) -> Checkpoint:
    """Describe a shard set as the checkpoint it was cut from."""
    manifest = read_manifest(source)
    tensors = _assemble(source, manifest)
    side_files = {file.name: _side_file(source, file) for file in manifest.files}
    accounts = replace(read_accounts(side_files), recorded=_recorded(manifest))
    _, layers, _ = describe_layers(tensors, (), accounts)
    _check_activations(manifest, layers)
    return Checkpoint(
        identity=identity(manifest),
        model=manifest.model,
        layers=layers,
        side_files=side_files,
        total_tensors=len(tensors),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _recorded(manifest: Manifest) -> dict[str, Recorded]:
    """What the set was cut as, by the linears' names: its files may have been told, or found, to be that."""
    recorded: dict[str, Recorded] = {}
    for layer in manifest.layers:
        parent = module_name(manifest.model.prefix, layer.index)
        for module in DENSE_FFN.modules:
            if (linear := layer.linears.get(module.name)) is not None:
                for name in (module.name, *(role.name for role in module.roles)):
                    recorded[f"{parent}.{name}"] = Recorded(linear.scheme, linear.block)
    return recorded


def _check_activations(manifest: Manifest, layers: Iterable[Layer]) -> None:
    """What the manifest says is computed against the set's own config.json."""
    said = {layer.index: layer.activation for layer in manifest.layers}
    for layer in layers:
        if layer.index in said and said[layer.index] != layer.activation:
            raise ManifestError(
                f"{MANIFEST}: layer {layer.index}'s activation is {said[layer.index]}, the set's {CONFIG} makes it "
                f"{layer.activation}; cut the set again"
            )


def _side_file(source: Source, file: SideFile) -> bytes:
    data = read_file(source, file.name)
    require(fit_side_file(file, data), SourceError)
    return data


def identity(manifest: Manifest) -> Identity:
    """What the set was first cut from."""
    source = manifest.source
    return Identity(source.kind, source.name, source.commit, tuple(source.files), source.sample_blake3)


def _assemble(source: Source, manifest: Manifest) -> dict[str, Tensor]:
    """Every source tensor that slices name, covered by rectangles of the shards."""
    shapes: dict[str, tuple[str, tuple[int, ...], Conversion | None]] = {}
    slices: dict[str, dict[tuple[int, int, int], Extent]] = {}
    aliases: dict[str, str] = {}
    headers = read_headers(source, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        header = headers[shard.file]
        require(fit_tensors(header, shard), SourceError)
        for tensor in shard.tensors:
            for piece in tensor.slices:
                conversion = _conversion(tensor, piece.tensor)
                described = (tensor.dtype, piece.shape, conversion)
                if shapes.setdefault(piece.tensor, described) != described:
                    raise ManifestError(f"{MANIFEST}: {piece.tensor} is described in two ways; the set is damaged")
                key = (piece.dim, piece.start, piece.stop)
                # What is replicated lies in every shard: the first one's copy is taken.
                extent = _extent(shard.file, header.tensors[tensor.name], piece)
                slices.setdefault(piece.tensor, {}).setdefault(key, extent)
            for other in tensor.same_as:
                aliases[other] = tensor.slices[0].tensor
    found = {}
    for name, (dtype, shape, conversion) in shapes.items():
        _check_cover(name, shape, sorted(slices[name]))
        found[name] = Tensor(
            name, dtype, shape, tuple(extent for _, extent in sorted(slices[name].items())), conversion
        )
    for name, original in aliases.items():
        found[name] = replace(found[original], name=name)
    return found


def _conversion(tensor: ShardTensor, name: str) -> Conversion | None:
    """The conversion of one of the linears that a shard tensor holds: its inputs are the linear's own."""
    made, module = tensor.conversion, name.rpartition(".")[0]
    if made is None:
        return None
    return Conversion(rule=made.rule, inputs=tuple(i for i in made.inputs if i.rpartition(".")[0] == module))


def _extent(file: str, info: TensorInfo, piece: Slice) -> Extent:
    size, length = itemsize(info.dtype), piece.stop - piece.start
    stride = prod(info.shape[1:]) * size
    rows = info.shape[0] if info.shape else 1
    size_of_dim = info.shape[piece.dim] if piece.dim < len(info.shape) else 1
    if piece.at + length > size_of_dim or piece.dim >= max(1, len(info.shape)):
        raise ManifestError(
            f"{MANIFEST}: {piece.tensor}: slice {piece.start}..{piece.stop} does not fit its shard tensor"
        )
    if piece.dim == 0:
        return Extent(file, info.start + piece.at * stride, stride, piece.start, 0, length, stride)
    return Extent(file, info.start + piece.at * size, stride, 0, piece.start * size, rows, length * size)


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[tuple[int, int, int]]) -> None:
    """The slices of a tensor follow one another along one dimension, from its start to its end."""
    at = 0
    dim = pieces[0][0]
    for piece_dim, start, stop in pieces:
        if piece_dim != dim or start != at:
            raise ManifestError(f"{MANIFEST}: {name}: no shard holds positions {at}..{start} of dim {dim}")
        at = stop
    extent = shape[dim] if shape else 1
    if at != extent:
        raise ManifestError(f"{MANIFEST}: {name}: the shards hold positions 0..{at} of dim {dim}, it has {extent}")
