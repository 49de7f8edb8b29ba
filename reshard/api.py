"""The functions of the library: what the commands do, with plain arguments and results. `import reshard` gives them.

Addresses are those of the command line: a folder, ORG/NAME on the hub, s3://… and the like. What a user can cause
raises a ReshardError. Two arguments are common to all: `warn` takes each warning's line, by default to the logger
"reshard"; `progress(what, total)` returns a context manager that yields a function which takes the bytes done.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reshard.checkpoint.describe import of_activations
from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.checks.report import Device, Report, Request, Serving
from reshard.checks.run import check_config, check_source
from reshard.convert import Weights
from reshard.errors import ReshardError, UsageError
from reshard.manifest import Manifest
from reshard.model.naming import CONFIG, MANIFEST
from reshard.model.parts import part_named
from reshard.plan.pipeline import Cut, check_set_digests, prepare
from reshard.safe_text import safe_line
from reshard.source.address import parse_local_target
from reshard.source.base import Source
from reshard.source.open import describe, each_set, open_part, open_source
from reshard.source.shardset import read_manifest_only, read_shard_set, require_shard_set
from reshard.verification.compute import LayerResult
from reshard.verification.digests import verify_digests
from reshard.verification.source import compare_with_source
from reshard.writer.merge import MergedFile
from reshard.writer.merge import merge as merge_sets
from reshard.writer.open import open_target
from reshard.writer.split import DEFAULT_WORKERS, SplitOptions, SplitResult, write_shards

Address = str | os.PathLike[str]
Warn = Callable[[str], None]
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

_log = logging.getLogger("reshard")


def _safely(warn: Warn) -> Warn:
    return lambda line: warn(safe_line(line))


@contextlib.contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda nbytes: None


def split(
    source: Address,
    out: Address,
    tp: int,
    *,
    weights: Weights = "keep",
    quant_format: Literal["modelslim", "compressed-tensors"] = "modelslim",
    layout: Literal["fused", "separate"] = "fused",
    pad: bool = False,
    ranks: tuple[int, ...] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = DEFAULT_WORKERS,
    part: str | None = None,
    scheme: str | None = None,
    revision: str | None = None,
    index: str | None = None,
    warn: Warn = _log.warning,
    progress: Progress = _silent,
) -> SplitResult:
    """Cut a checkpoint's dense layers, or another `part`, for `tp` ranks.

    The arguments are the options of `reshard split`, which cuts several parts into folders of `out`, one after another.
    """
    what = None if part is None else part_named(part)
    warn = _safely(warn)
    cut = Cut(tp, layout, pad, weights, quant_format, scheme, what)
    options = SplitOptions(ranks, resume, overwrite, workers)
    address, opened = open_part(os.fspath(source), what, revision, index=index, notify=warn)
    with opened:
        target = open_target(os.fspath(out), address)
        prepared = prepare(opened, cut)
        for line in prepared.checkpoint.warnings:
            warn(line)
        check_set_digests(opened, workers)
        total = sum(shard.size for shard in prepared.plan.shards if ranks is None or shard.tp_rank in ranks)
        with progress("split", total) as tick:
            return write_shards(prepared, target, options, tick)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. findings: differences; notes: what is worth a word and no difference.

    against_source: whether every byte, and the computation, was compared with a source; layers: each one's computation.
    """

    manifest: Manifest
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    against_source: bool
    layers: tuple[LayerResult, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no difference."""
        return not self.findings


def verify(
    shards: Address,
    source: Address | None = None,
    *,
    scheme: str | None = None,
    revision: str | None = None,
    index: str | None = None,
    warn: Warn = _log.warning,
    progress: Progress = _silent,
) -> Verification:
    """A shard set against its manifest and, with `source`, against what it was cut from.

    Look at `ok`: it raises only where something cannot be read.
    """
    for option, value in (("--scheme", scheme), ("--index", index), ("--revision", revision)):
        if value is not None and source is None:
            way_out = f", or SHARDS as hf://ORG/NAME@{value}" if option == "--revision" else ", or leave it out"
            raise UsageError(f"{option} {value}: is the source's; give --source{way_out}")
    warn, layers = _safely(warn), list[LayerResult]()
    with open_source(os.fspath(shards), notify=warn) as opened:
        require_shard_set(opened)
        manifest = read_manifest_only(opened)
        nbytes = sum(shard.size for shard in manifest.shards)
        with progress("digests", nbytes) as tick:
            found = verify_digests(opened, manifest, DEFAULT_WORKERS, tick)
        readable = not any(finding.check in {"file", "size", "header"} for finding in found)
        if readable:
            found += _as_recomputed(opened)
        comparable = source is not None and readable
        if source is not None and comparable:
            with open_part(os.fspath(source), manifest.what, revision, index=index, notify=warn)[1] as original:
                checkpoint = describe(original, scheme, manifest.what)
                # compare_with_source says it, too
                left_out = {*of_activations(checkpoint.layers, config=CONFIG in checkpoint.side_files)}
                for line in checkpoint.warnings:
                    if line not in left_out:
                        warn(line)
                with progress("source", nbytes) as tick:
                    more, layers = compare_with_source(opened, manifest, original, checkpoint, tick)
                    found += more
                original.check_unchanged()
        opened.check_unchanged()
    # Bytes are what counts: the same weights in other files are no mismatch, and still worth a word.
    findings, notes = (tuple(f for f in found if f.severity == severity) for severity in ("error", "warning"))
    return Verification(manifest, findings, notes, comparable, tuple(layers))


def _as_recomputed(opened: Source) -> Iterator[Finding]:
    """What the manifest says that is not what it must be."""
    try:
        read_shard_set(opened)
    except ReshardError as error:
        yield Finding("manifest", MANIFEST, str(error).removeprefix(f"{MANIFEST}: "))


@dataclass(frozen=True)
class MergeResult:
    """The checkpoint that `merge` wrote: its folder and the files of its weights."""

    out: Path
    files: tuple[MergedFile, ...]


def merge(shards: Address, out: Address, *, warn: Warn = _log.warning, progress: Progress = _silent) -> MergeResult:
    """Put shard sets, of one part or several, together again, bit for bit, in a new or empty folder with an index."""
    folder = parse_local_target(os.fspath(out), "merge")
    with contextlib.ExitStack() as held:

        def opened(address: str) -> tuple[Source, Checkpoint]:
            source = held.enter_context(open_source(address, notify=_safely(warn)))
            require_shard_set(source)
            found = source, read_shard_set(source)
            check_set_digests(source, DEFAULT_WORKERS)
            return found

        sets = each_set(os.fspath(shards), opened)
        with progress("merge", sum(checkpoint.nbytes for _, checkpoint in sets)) as tick:
            return MergeResult(folder, tuple(merge_sets(sets, folder, tick)))


def check(
    path: Address | None = None,
    *,
    config: Address | None = None,
    tp: int | tuple[int, ...] = (),
    scheme: str | None = None,
    weights: Weights = "keep",
    pad: bool = False,
    against: Address | None = None,
    device: Device = "cpu",
    additional_config: Mapping[str, Any] | None = None,
    data_parallel_size: int | None = None,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    part: str | None = None,
    enforce_eager: bool = False,
    kv_role: str | None = None,
    revision: str | None = None,
    index: str | None = None,
    warn: Warn = _log.warning,
) -> Report:
    """A checkpoint or shard set at `path`, or the config.json at `config`, from headers and arithmetic alone.

    The arguments are the options of `reshard check`. Look at the report's `failed()`: it raises only where something
    cannot be read, or an argument makes no sense.
    """
    sizes = (data_parallel_size, tensor_parallel_size, pipeline_parallel_size)
    request = Request(
        tp_sizes=(tp,) if isinstance(tp, int) else tuple(tp),
        scheme=scheme,
        weights=weights,
        pad=pad,
        against=None if against is None else os.fspath(against),
        device=device,
        serving=serving(additional_config, *sizes, enforce_eager=enforce_eager, kv_role=kv_role),
        revision=revision,
        index=index,
        part=None if part is None else part_named(part),
    )
    if path is not None and config is None:
        return check_source(os.fspath(path), request, _safely(warn))
    if config is not None and path is None:
        return check_config(os.fspath(config), request)
    raise UsageError("check: give a path, or config=")


def serving(
    additional_config: Mapping[str, Any] | None,
    *sizes: int | None,
    enforce_eager: bool = False,
    kv_role: str | None = None,
) -> Serving | None:
    """The setup of an engine, if anything is said of one. sizes: data-, tensor- and pipeline-parallel."""
    if additional_config is None and enforce_eager is False and all(given is None for given in (*sizes, kv_role)):
        return None
    data, tensor, pipeline = (1 if size is None else size for size in sizes)
    config = {} if additional_config is None else additional_config
    return Serving(config, data, tensor, pipeline, enforce_eager, kv_role)
