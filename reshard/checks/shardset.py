"""A shard set: its manifest, its files' headers, and the cut that they claim to be."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.checks.layers import check_layers
from reshard.checks.provenance import compare_identity, compare_model
from reshard.checks.report import not_checked
from reshard.errors import AlignmentError, HeaderError, ManifestError
from reshard.fit import fit_files, fit_header, fit_names, fit_side_file
from reshard.manifest import Manifest
from reshard.model.naming import MANIFEST
from reshard.plan.plan import RE_SHARDED, Plan, make_plan
from reshard.plan.recompute import contradictions
from reshard.source.base import Source, read_file, read_header
from reshard.source.shardset import read_as_claimed, read_manifest_only, require_shard_set

_AFTER_MANIFEST = ("ranks", "headers", "layers", "shapes", "scheme", "cut")
_SHOWN = 100
_AFTER_HEADERS = ("layers", "shapes", "scheme", "cut")


def check_set(source: Source) -> tuple[list[Finding], Manifest | None, Checkpoint | None]:
    """Findings, and what the set is if it is whole: its manifest, and the checkpoint that it puts together again."""
    try:
        require_shard_set(source)
        manifest = read_manifest_only(source)
    except ManifestError as error:
        return [Finding("manifest", "", str(error)), *not_checked(_AFTER_MANIFEST, "see manifest")], None, None
    made_by = f"{manifest.generator.name} {manifest.generator.version}"
    line = f"{manifest.schema_} by {made_by}: {manifest.scheme} for tp {manifest.tp_size}, {manifest.layout} layout"
    ranks = list(_ranks(source, manifest))
    headers = list(_headers(source, manifest))
    found = [
        Finding("manifest", "", line, "ok"),
        *(ranks or [Finding("ranks", "", f"all {manifest.tp_size} shards, in the sizes that it names", "ok")]),
        *(headers or [Finding("headers", "", _headers_ok(manifest), "ok")]),
    ]
    if ranks or headers:
        return [*found, *not_checked(_AFTER_HEADERS, "see ranks and headers")], manifest, None
    try:
        described, checkpoint = check_layers(lambda: read_as_claimed(source))
    except ManifestError as error:  # slices that do not make whole tensors
        others = tuple(check for check in _AFTER_HEADERS if check != "cut")
        return [*found, *not_checked(others, "see cut"), Finding("cut", "", str(error))], manifest, None
    if checkpoint is None:
        return [*found, *described, *not_checked(("cut",), "the set's own layers are wrong")], manifest, None
    unlike = islice(contradictions(manifest, checkpoint), _SHOWN)
    wrong = [Finding(misfit.rule, misfit.file, misfit.message) for misfit in unlike]
    failed = {finding.check for finding in wrong}
    found += [finding for finding in described if finding.check not in failed]
    if "cut" not in failed:
        tensors = sum(len(shard.tensors) for shard in manifest.shards)
        wrong.append(Finding("cut", "", f"{tensors} tensors, slice by slice what cutting them again gives", "ok"))
    return [*found, *wrong], manifest, checkpoint


def check_size(
    manifest: Manifest, checkpoint: Checkpoint | None, tp_sizes: tuple[int, ...], takes: Callable[[int], bool]
) -> list[Finding]:
    """Whether the set is cut for one of the sizes that are asked for; checkpoint: what it puts together, if whole.

    takes: whether it can be cut again for a size, and that set passes these checks.
    """
    if not tp_sizes:
        return []
    if manifest.tp_size in tp_sizes:
        return [Finding("size", "", f"cut for tp {manifest.tp_size}, as --tp asks for", "ok")]
    line = f"cut for tp {manifest.tp_size}, --tp asks for {', '.join(map(str, tp_sizes))}"
    return [Finding("size", "", f"{line}{_re_sharded(manifest, checkpoint, tp_sizes, takes)}")]


def check_origin(manifest: Manifest, original: Checkpoint, name: str) -> list[Finding]:
    """Whether the set was cut from that checkpoint. Same headers may hold other values: those, verify tells apart."""
    wrong = [
        replace(finding, check="source", severity="error")
        for finding in (*compare_identity(manifest, original), *compare_model(manifest, original))
    ]
    if wrong:
        hint = "the same weights in other files? reshard verify --source compares the bytes"
        return [replace(wrong[0], message=f"{wrong[0].message}; {hint}"), *wrong[1:]]
    files = len(manifest.source.files)
    cut, there = (_repository(s.name, s.commit) for s in (manifest.source, original.identity))
    if cut and there and cut != there:
        line = (
            f"the set was cut from {cut}, this is {there}: files of the same names, sizes and headers, which may hold "
            "other values; reshard verify --source compares the bytes"
        )
        return [Finding("source", "", line, "warning")]
    line = (
        f"{name}: {files} {'file' if files == 1 else 'files'}, of the names, sizes and headers that the set was cut "
        "from; their bytes: reshard verify --source"
    )
    return [Finding("source", "", line, "ok")]


def _re_sharded(
    manifest: Manifest, checkpoint: Checkpoint | None, tp_sizes: tuple[int, ...], takes: Callable[[int], bool]
) -> str:
    """The way to one of the sizes, or why there is none; to be added to a line."""
    if checkpoint is None:
        return ""
    if taken := next(filter(takes, tp_sizes), None):
        layout = "" if manifest.layout == "fused" else f" --layout {manifest.layout}"
        return f"; reshard split SET OUT --tp {taken}{layout} re-shards it"
    for size in tp_sizes:
        try:
            make_plan(checkpoint, size, manifest.layout, tp_ranks=(), ways=replace(RE_SHARDED, takes=takes))
        except AlignmentError as error:
            return f"; {error}"
    return ""


def _repository(name: str, commit: str | None) -> str | None:
    return f"{name} at commit {commit}" if commit else None


def plan_of(manifest: Manifest, checkpoint: Checkpoint, layout: str, tp_ranks: Iterable[int] | None = None) -> Plan:
    """The set's own cut of its own weights. Raises AlignmentError where its sizes do not allow that."""
    return make_plan(checkpoint, manifest.tp_size, layout, manifest.padding is not None, tp_ranks, RE_SHARDED)


def _ranks(source: Source, manifest: Manifest) -> Iterator[Finding]:
    sizes = source.files()
    misfits = [*fit_files(manifest, sizes, source.absent), *fit_names(manifest, sizes)]
    for file in manifest.files:
        if sizes.get(file.name) == file.size:
            misfits += fit_side_file(file, read_file(source, file.name))
    yield from (Finding("ranks", misfit.file, misfit.message) for misfit in misfits)


def _headers(source: Source, manifest: Manifest) -> Iterator[Finding]:
    for shard in manifest.shards:
        if source.files().get(shard.file) != shard.size:
            continue
        try:
            misfits = list(fit_header(read_header(source, shard.file), shard, manifest))
        except HeaderError as error:
            yield Finding("headers", "", str(error))  # it begins with the file
            continue
        yield from (Finding("headers", misfit.file, misfit.message) for misfit in misfits)


def _headers_ok(manifest: Manifest) -> str:
    return f"{manifest.tp_size} headers with the tensors, types and shapes of {MANIFEST}"
