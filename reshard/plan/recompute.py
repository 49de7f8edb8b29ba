"""What a manifest says, recomputed and compared, before anything is taken from a set: nothing in it is believed.

The slices are put together to the checkpoint that they claim to be of. What config.json and the files beside it, the
table of schemes and the plan make of that must be what the manifest says, field by field. No input, no output.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod

from reshard.checkpoint.describe import describe_layers
from reshard.checkpoint.description import Checkpoint, Extent, Identity, Tensor
from reshard.convert.rules import check_conversion
from reshard.errors import AlignmentError, ManifestError, SchemeError
from reshard.fit import Misfit
from reshard.manifest import Conversion, LayerEntry, Manifest, ShardTensor, Slice
from reshard.model.naming import CONFIG, MANIFEST, linear_name, parse_tensor
from reshard.plan.manifest_builder import layer_entries, scheme_name
from reshard.plan.plan import RE_SHARDED, PlannedTensor, make_plan
from reshard.quantization import is_description, read_accounts
from reshard.schemes.table import told_by_tensors
from reshard.tensors.dtypes import itemsize

Start = Callable[[str, str], int]
"""(a shard's file, a tensor's name) -> the tensor's first byte in the file."""


def describe_set(
    manifest: Manifest, side_files: Mapping[str, bytes], start: Start = lambda file, name: 0
) -> Checkpoint:
    """The checkpoint that a set was cut from. side_files: the bytes of those that go with it (see `needed`).

    Without `start` no tensor's place in a file is right. Raises ManifestError for the first thing that is not what it
    must be, what `describe_layers` raises where no checkpoint is of such tensors.
    """
    checkpoint = put_together(manifest, side_files, start)
    for misfit in contradictions(manifest, checkpoint):
        where = MANIFEST if misfit.file == MANIFEST else f"{MANIFEST}: {misfit.file}"
        raise ManifestError(f"{where}: {misfit.message}; copy the set again, or cut it again")
    return checkpoint


def needed(manifest: Manifest) -> Iterator[str]:
    """The side files that tell what the tensors do not; a description, which may be large, only for some schemes."""
    schemes = {linear.scheme for layer in manifest.layers for linear in layer.linears.values()}
    for file in manifest.files:
        if not is_description(file.name) or not all(map(told_by_tensors, schemes)):
            yield file.name


def put_together(manifest: Manifest, side_files: Mapping[str, bytes], start: Start) -> Checkpoint:
    """The checkpoint that the slices make, whatever else the manifest says."""
    tensors = _assemble(manifest, start)
    accounts = replace(read_accounts(side_files), recorded=_schemes(manifest))
    model, layers, _ = describe_layers(tensors, (), accounts, manifest.what)
    source = manifest.source
    return Checkpoint(
        identity=Identity(source.kind, source.name, source.commit, tuple(source.files), source.sample_blake3),
        model=model,
        layers=layers,
        side_files=side_files,
        total_tensors=len(tensors),
        total_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def contradictions(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Misfit]:
    """What the manifest says, against what the checkpoint that it makes is, and against the cut of that."""
    for name, real in checkpoint.model.model_dump().items():
        if (said := getattr(manifest.model, name)) != real:
            yield Misfit(
                "shapes" if name in manifest.what.sizes else "layers",
                MANIFEST,
                f"{name} is {said!r}, its tensors and {CONFIG} make it {real!r}",
            )
    if manifest.scheme != (scheme := scheme_name(checkpoint.layers)):
        yield Misfit("scheme", MANIFEST, f"its scheme is {manifest.scheme}, its layers make it {scheme}")
    yield from _layers(manifest.layers, layer_entries(checkpoint.layers))
    yield from _conversions(checkpoint)
    yield from _cut(manifest, checkpoint)


def _schemes(manifest: Manifest) -> dict[str, str]:
    """What the set was cut as, by the linears' names: its files may have been told, or found, to be that."""
    schemes = {}
    for layer in manifest.layers:
        for module in manifest.what.modules:
            for name in (module.name, *(role.name for role in module.roles)):
                full = linear_name(manifest.model.prefix, layer.index, name, manifest.what)
                schemes[full] = layer.linears[module.name].scheme
    return schemes


def _layers(said: list[LayerEntry], real: list[LayerEntry]) -> Iterator[Misfit]:
    indexes, real_indexes = ([layer.index for layer in layers] for layers in (said, real))
    if indexes != real_indexes:
        yield Misfit("layers", MANIFEST, f"its layers are {indexes}, its tensors are of {real_indexes}")
        return
    for ours, theirs in zip(said, real, strict=True):
        if ours.activation != theirs.activation:
            line = f"layer {ours.index}'s activation is {ours.activation}, {CONFIG} makes it {theirs.activation}"
            yield Misfit("scheme", MANIFEST, line)
        for name, linear in ours.linears.items():
            if linear != theirs.linears[name]:
                line = f"{name} of layer {ours.index} is {linear}, its tensors and {CONFIG} make it "
                yield Misfit("scheme", MANIFEST, f"{line}{theirs.linears[name]}")


def _conversions(checkpoint: Checkpoint) -> Iterator[Misfit]:
    for layer in checkpoint.layers:
        for role, linear in layer.linears.items():
            try:
                check_conversion(linear, layer.name(role))
            except SchemeError as error:
                yield Misfit("scheme", MANIFEST, str(error))


def _cut(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Misfit]:
    """The shards' tensors and slices, rank by rank."""
    for name in sorted({piece.tensor for s in manifest.shards for t in s.tensors for piece in t.slices}):
        if parse_tensor(name, manifest.what) is None:
            line = f"{name} is sliced, and is no {manifest.what.name} tensor: it must not be in a set"
            yield Misfit("cut", MANIFEST, line)
    cut = (manifest.tp_size, manifest.layout, manifest.padding is not None)
    try:
        padding = make_plan(checkpoint, *cut, tp_ranks=(), ways=RE_SHARDED).padding
    except AlignmentError as error:
        yield Misfit("cut", MANIFEST, str(error))
        return
    if manifest.padding != padding:
        yield Misfit("cut", MANIFEST, f"padding is {manifest.padding}, the sizes make it {padding}")
    for shard in manifest.shards:
        (planned,) = make_plan(checkpoint, *cut, tp_ranks=(shard.tp_rank,)).shards
        said = {tensor.name: tensor for tensor in shard.tensors}
        real = {tensor.name: tensor for tensor in planned.tensors}
        for name in sorted(said.keys() | real.keys()):
            if name not in real:
                line = f"{MANIFEST} has it, cutting the set's weights gives none of that name"
            elif name not in said:
                line = f"missing; a cut has it: {real[name].dtype} {list(real[name].shape)}"
            elif not (line := ", ".join(_differences(said[name], real[name]))):
                continue
            yield Misfit("cut", f"{shard.file}: {name}", line)
        if said.keys() == real.keys() and list(said) != list(real):
            yield Misfit("cut", shard.file, f"its tensors are in the order {list(said)}, a cut has {list(real)}")


def _differences(said: ShardTensor, real: PlannedTensor) -> Iterator[str]:
    for field in ("dtype", "shape", "same_as", "conversion"):
        if (ours := getattr(said, field)) != (theirs := getattr(real, field)):
            yield f"{field} is {ours}, a cut gives {theirs}"
    if said.slices != real.slices:
        yield f"is of {_spelt(said.slices)}, a cut gives {_spelt(real.slices)}"


def _spelt(slices: tuple[Slice, ...]) -> str:
    return ", ".join(f"{s.tensor} {list(s.shape)} dim {s.dim} {s.start}..{s.stop} at {s.at}" for s in slices) or "zeros"


def _assemble(manifest: Manifest, start: Start) -> dict[str, Tensor]:
    """Every source tensor that slices name, covered by rectangles of the shards."""
    shapes: dict[str, tuple[str, tuple[int, ...], Conversion | None]] = {}
    slices: dict[str, dict[tuple[int, int, int], Extent]] = {}
    aliases: dict[str, str] = {}
    for shard in manifest.shards:
        for tensor in shard.tensors:
            for piece in tensor.slices:
                described = (tensor.dtype, piece.shape, _conversion(tensor, piece.tensor))
                if shapes.setdefault(piece.tensor, described) != described:
                    raise ManifestError(
                        f"{MANIFEST}: {piece.tensor} is described in two ways: {shapes[piece.tensor]}, and by "
                        f"{shard.file} {described}; copy the set again, or cut it again"
                    )
                key = (piece.dim, piece.start, piece.stop)
                # What is replicated lies in every shard: the first one's copy is taken.
                extent = _extent(shard.file, start(shard.file, tensor.name), tensor, piece)
                slices.setdefault(piece.tensor, {}).setdefault(key, extent)
            for other in tensor.same_as:
                aliases[other] = tensor.slices[0].tensor
    found = {}
    for name, (dtype, shape, conversion) in shapes.items():
        _check_cover(name, shape, sorted(slices[name]))
        extents = tuple(extent for _, extent in sorted(slices[name].items()))
        found[name] = Tensor(name, dtype, shape, extents, conversion)
    return found | {name: replace(found[original], name=name) for name, original in aliases.items()}


def _conversion(tensor: ShardTensor, name: str) -> Conversion | None:
    """The conversion of one of the linears that a shard tensor holds: its inputs are the linear's own."""
    made, module = tensor.conversion, name.rpartition(".")[0]
    if made is None:
        return None
    return Conversion(rule=made.rule, inputs=tuple(i for i in made.inputs if i.rpartition(".")[0] == module))


def _extent(file: str, start: int, tensor: ShardTensor, piece: Slice) -> Extent:
    size, length = itemsize(tensor.dtype), piece.stop - piece.start
    stride = prod(tensor.shape[1:]) * size
    rows = tensor.shape[0] if tensor.shape else 1
    size_of_dim = tensor.shape[piece.dim] if piece.dim < len(tensor.shape) else 1
    if piece.at + length > size_of_dim or piece.dim >= max(1, len(tensor.shape)):
        raise ManifestError(
            f"{MANIFEST}: {file}: {tensor.name}: slice {piece.start}..{piece.stop} of {piece.tensor} at {piece.at} of "
            f"dim {piece.dim} is not within {list(tensor.shape)}; copy the set again, or cut it again"
        )
    if piece.dim == 0:
        return Extent(file, start + piece.at * stride, stride, piece.start, 0, length, stride)
    return Extent(file, start + piece.at * size, stride, 0, piece.start * size, rows, length * size)


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[tuple[int, int, int]]) -> None:
    """The slices of a tensor follow one another along one dimension, from its start to its end."""
    at = 0
    dim = pieces[0][0]
    again = "copy the set again, or cut it again"
    for piece_dim, start, stop in pieces:
        if piece_dim != dim or start != at:
            raise ManifestError(f"{MANIFEST}: {name}: no shard holds positions {at}..{start} of dim {dim}; {again}")
        at = stop
    extent = shape[dim] if shape else 1
    if at != extent:
        raise ManifestError(
            f"{MANIFEST}: {name}: the shards hold positions 0..{at} of dim {dim}, it has {extent}; {again}"
        )
