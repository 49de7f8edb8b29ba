"""A shard set read as a checkpoint: the Hugging Face tensors that its manifest's slices put together again."""

from reshard.checkpoint.description import Checkpoint
from reshard.errors import ManifestError, SourceError
from reshard.fit import fit_files, fit_header, fit_side_file, require
from reshard.limits import MANIFEST_BYTES
from reshard.manifest import Manifest, SideFile, parse_manifest
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.plan.recompute import Start, describe_set, put_together
from reshard.source.base import Source, read_file, read_headers


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
    raise ManifestError(f"{source.origin.name}: is no shard set: it holds no …-rank-…-of-….safetensors")


def read_manifest_only(source: Source) -> Manifest:
    """The set's manifest, whatever its files are."""
    return parse_manifest(read_file(source, MANIFEST, MANIFEST_BYTES))


def read_manifest(source: Source) -> Manifest:
    """The set's manifest, its files there in the sizes it names."""
    manifest = read_manifest_only(source)
    require(fit_files(manifest, source.files(), source.absent), SourceError)
    return manifest


def read_shard_set(source: Source) -> Checkpoint:
    """Describe a shard set as the checkpoint it was cut from. Raises as reshard.plan.recompute does."""
    return describe_set(*_parts(source))


def read_as_claimed(source: Source) -> Checkpoint:
    """The checkpoint that the set's slices make, where what is wrong with the rest of its manifest is to be listed."""
    return put_together(*_parts(source))


def _parts(source: Source) -> tuple[Manifest, dict[str, bytes], Start]:
    """The manifest, the files that go with the set, and where tensors begin; all as the manifest says."""
    manifest = read_manifest(source)
    headers = read_headers(source, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        require(fit_header(headers[shard.file], shard, manifest), SourceError)
    side_files = {file.name: _side_file(source, file) for file in manifest.files}
    return manifest, side_files, lambda file, name: headers[file].tensors[name].start


def _side_file(source: Source, file: SideFile) -> bytes:
    data = read_file(source, file.name)
    require(fit_side_file(file, data), SourceError)
    return data
