"""A shard set against its own manifest: every file there, of the right size, header, digests; nothing besides."""

from collections.abc import Callable, Iterator
from tempfile import NamedTemporaryFile

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from reshard.checks.finding import Finding
from reshard.errors import SourceError
from reshard.manifest import Manifest, Shard
from reshard.model.naming import MANIFEST, parse_shard_file
from reshard.source.base import Source, read_file, read_header, threads
from reshard.source.shardset import check_header, not_there
from reshard.tensors.header import Header

Tick = Callable[[int], None]
_BLOCK = 1 << 20


def verify_digests(source: Source, manifest: Manifest, workers: int, tick: Tick) -> list[Finding]:
    """What differs from the manifest; nothing is changed."""
    findings = list(_check_files(source, manifest))
    with threads(workers, source) as pool:
        for found in pool.map(lambda shard: list(_check_shard(source, shard, tick)), manifest.shards):
            findings += found
    return findings


def _check_files(source: Source, manifest: Manifest) -> Iterator[Finding]:
    files = source.files()
    for file in manifest.files:
        if file.name not in files:
            yield Finding("file", file.name, not_there(source, file.name))
            continue
        digest = blake3(read_file(source, file.name)).hexdigest()
        if digest != file.blake3:
            yield Finding("file", file.name, f"BLAKE3 is {digest}, {MANIFEST} says {file.blake3}")
    named = {shard.file for shard in manifest.shards}
    for name in sorted(files):
        if parse_shard_file(name) and name not in named:
            yield Finding("file", name, f"a shard that {MANIFEST} does not name")


def _check_shard(source: Source, shard: Shard, tick: Tick) -> Iterator[Finding]:
    size = source.files().get(shard.file)
    if size is None:
        yield Finding("file", shard.file, not_there(source, shard.file))
        return
    if size != shard.size:
        yield Finding("size", shard.file, f"{size} bytes, {MANIFEST} says {shard.size}")
        return
    source.prefetch([(shard.file, 0, size)])
    try:
        header = read_header(source, shard.file)
        check_header(header, shard.tensors, shard.file)
        if not _read_alike(source, header, shard.file):
            yield Finding("header", shard.file, "safetensors' own reader sees other tensors or metadata")
    except (SourceError, SafetensorError) as error:
        yield Finding("header", shard.file, str(error))
        return
    yield from _check_rank(header, shard)
    yield from _check_digests(source, header, shard, tick)


def _read_alike(source: Source, header: Header, file: str) -> bool:
    """A second opinion on a header: that of the library that engines read it with. It wants a file, not its data."""
    with NamedTemporaryFile(buffering=0) as bare:
        bare.write(source.read(file, 0, header.data_start))
        bare.truncate(header.file_size)
        with safe_open(bare.name, framework="np") as opened:
            return opened.metadata() == dict(header.metadata) and set(opened.keys()) == set(header.tensors)


def _check_rank(header: Header, shard: Shard) -> Iterator[Finding]:
    rank = header.metadata.get("tp_rank")
    if rank != str(shard.tp_rank):
        yield Finding("header", shard.file, f"its header says tp_rank {rank}, its name {shard.tp_rank}")


def _check_digests(source: Source, header: Header, shard: Shard, tick: Tick) -> Iterator[Finding]:
    whole = blake3(source.view(shard.file, 0, header.data_start).data)
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start):
        own = blake3()
        for at in range(info.start, info.stop, _BLOCK):
            block = source.view(shard.file, at, min(at + _BLOCK, info.stop))
            own.update(block.data)
            whole.update(block.data)
            tick(block.size)
        if own.hexdigest() != tensors[name].blake3:
            yield Finding(
                "digest",
                f"{shard.file}: {name}",
                f"BLAKE3 is {own.hexdigest()}, {MANIFEST} says {tensors[name].blake3}",
            )
    if whole.hexdigest() != shard.blake3:
        yield Finding("digest", shard.file, f"BLAKE3 is {whole.hexdigest()}, {MANIFEST} says {shard.blake3}")
