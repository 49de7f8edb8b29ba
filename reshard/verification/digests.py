"""A shard set against its own manifest: every file there, of the right size, header, digests; nothing besides."""

from collections.abc import Callable, Iterator
from tempfile import NamedTemporaryFile

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from reshard.checks.finding import Finding
from reshard.errors import HeaderError
from reshard.fit import Misfit, fit_digest, fit_files, fit_names, fit_rank, fit_side_file, fit_tensors
from reshard.manifest import Manifest, Shard
from reshard.source.base import Source, read_file, read_header
from reshard.tensors.header import Header
from reshard.workers import Workers

Tick = Callable[[int], None]


def verify_digests(source: Source, manifest: Manifest, workers: int, tick: Tick) -> list[Finding]:
    """What differs from the manifest; nothing is changed."""
    misfits = list(_misfits(source, manifest))
    wrong = {misfit.file for misfit in misfits}
    shards = [shard for shard in manifest.shards if shard.file not in wrong]
    pool = Workers(workers, source)

    def step(nbytes: int) -> None:
        pool.tick(nbytes)
        tick(nbytes)

    for found in pool.map(lambda shard: list(_check_shard(source, shard, manifest, step)), shards):
        misfits += found
    return [Finding(misfit.rule, misfit.file, misfit.message) for misfit in misfits]


def _misfits(source: Source, manifest: Manifest) -> Iterator[Misfit]:
    files = source.files()
    yield from fit_files(manifest, files, source.absent)
    yield from fit_names(manifest, files)
    for file in manifest.files:
        if files.get(file.name) == file.size:
            yield from fit_side_file(file, read_file(source, file.name))


def _check_shard(source: Source, shard: Shard, manifest: Manifest, tick: Tick) -> Iterator[Misfit]:
    source.prefetch([(shard.file, 0, shard.size)])
    try:
        header = read_header(source, shard.file)
        misfits = list(fit_tensors(header, shard))
        if not misfits and not _read_alike(source, header, shard.file):
            misfits = [Misfit("header", shard.file, "safetensors' own reader sees other tensors or metadata")]
    except (HeaderError, SafetensorError) as error:
        misfits = [Misfit("header", shard.file, str(error).removeprefix(f"{shard.file}: "))]
    yield from misfits
    if not misfits:
        yield from fit_rank(header, shard, manifest)
        yield from _check_digests(source, header, shard, tick)


def _read_alike(source: Source, header: Header, file: str) -> bool:
    """A second opinion on a header: that of the library that engines read it with. It wants a file, not its data."""
    with NamedTemporaryFile(buffering=0) as bare:
        bare.write(source.read(file, 0, header.data_start))
        bare.truncate(header.file_size)
        with safe_open(bare.name, framework="np") as opened:
            return opened.metadata() == dict(header.metadata) and set(opened.keys()) == set(header.tensors)


def _check_digests(source: Source, header: Header, shard: Shard, tick: Tick) -> Iterator[Misfit]:
    whole = blake3()
    for block in source.blocks(shard.file, 0, header.data_start):
        whole.update(block.data)
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        own = blake3()
        for block in source.blocks(shard.file, info.start, info.stop):
            own.update(block.data)
            whole.update(block.data)
            tick(block.size)
        yield from fit_digest(f"{shard.file}: {name}", own.hexdigest(), tensors[name].blake3)
    yield from fit_digest(shard.file, whole.hexdigest(), shard.blake3)
