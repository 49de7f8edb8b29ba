"""A shard set: its manifest, its files' headers, and the cut that they claim to be."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from reshard.checkpoint.description import Checkpoint
from reshard.checks.finding import Finding
from reshard.checks.layers import check_layers, config_of
from reshard.checks.provenance import compare_identity, compare_model
from reshard.checks.report import not_checked
from reshard.errors import AlignmentError, HeaderError, ManifestError
from reshard.fit import fit_files, fit_header, fit_names, fit_side_file
from reshard.manifest import Manifest, ShardTensor
from reshard.model.config import read_model_config
from reshard.model.naming import CONFIG, MANIFEST, parse_dense
from reshard.plan.manifest_builder import layer_entries, scheme_name
from reshard.plan.plan import Plan, PlannedTensor, make_plan
from reshard.source.base import Source, read_file, read_header
from reshard.source.shardset import read_manifest_only, read_shard_set, require_shard_set

_AFTER_MANIFEST = ("ranks", "headers", "layers", "shapes", "scheme", "cut")
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
        described, checkpoint = check_layers(lambda: read_shard_set(source))
    except ManifestError as error:  # slices that do not make whole tensors
        others = tuple(check for check in _AFTER_HEADERS if check != "cut")
        return [*found, *not_checked(others, "see cut"), Finding("cut", "", str(error))], manifest, None
    if checkpoint is None:
        return [*found, *described, *not_checked(("cut",), "the set's own layers are wrong")], manifest, None
    wrong = [*_recorded(manifest, checkpoint), *_cut(manifest, checkpoint)]
    failed = {finding.check for finding in wrong}
    found += [finding for finding in described if finding.check not in failed]
    if "cut" not in failed:
        tensors = sum(len(shard.tensors) for shard in manifest.shards)
        wrong.append(Finding("cut", "", f"{tensors} tensors, slice by slice what cutting them again gives", "ok"))
    return [*found, *wrong], manifest, checkpoint


def check_size(manifest: Manifest, checkpoint: Checkpoint | None, tp_sizes: tuple[int, ...]) -> list[Finding]:
    """Whether the set is cut for one of the sizes that are asked for; checkpoint: what it puts together, if whole."""
    if not tp_sizes:
        return []
    if manifest.tp_size in tp_sizes:
        return [Finding("size", "", f"cut for tp {manifest.tp_size}, as --tp asks for", "ok")]
    line = f"cut for tp {manifest.tp_size}, --tp asks for {', '.join(map(str, tp_sizes))}"
    return [Finding("size", "", f"{line}{_re_sharded(manifest, checkpoint, tp_sizes)}")]


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


def _re_sharded(manifest: Manifest, checkpoint: Checkpoint | None, tp_sizes: tuple[int, ...]) -> str:
    """The way to one of the sizes, or why there is none; to be added to a line."""
    if checkpoint is None:
        return ""
    why = ""
    for size in tp_sizes:
        try:
            make_plan(checkpoint, size, manifest.layout, tp_ranks=())
        except AlignmentError as error:
            why = why or f"; {error}"
        else:
            return f"; reshard split SET OUT --tp {size} re-shards it"
    return why


def _repository(name: str, commit: str | None) -> str | None:
    return f"{name} at commit {commit}" if commit else None


def plan_of(manifest: Manifest, checkpoint: Checkpoint, layout: str, tp_ranks: Iterable[int] | None = None) -> Plan:
    """The set's own cut of its own weights. Raises AlignmentError where its sizes do not allow that."""
    return make_plan(checkpoint, manifest.tp_size, layout, manifest.padding is not None, tp_ranks)


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
            misfits = list(fit_header(read_header(source, shard.file), shard, manifest.tp_size))
        except HeaderError as error:
            yield Finding("headers", "", str(error))  # it begins with the file
            continue
        yield from (Finding("headers", misfit.file, misfit.message) for misfit in misfits)


def _headers_ok(manifest: Manifest) -> str:
    return f"{manifest.tp_size} headers with the tensors, types and shapes of {MANIFEST}"


def _recorded(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Finding]:
    """What the manifest says of the model, against the set's own tensors and config.json."""
    role = checkpoint.part.roles[0]
    weight = checkpoint.layers[0].linears[role.name].tensors["weight"]
    recorded = (getattr(manifest.model, role.out), getattr(manifest.model, role.in_))
    if weight.shape != recorded:
        line = f"{role.out} and {role.in_} are {list(recorded)}, {weight.name} is {list(weight.shape)}"
        yield Finding("shapes", MANIFEST, line)
    raw = config_of(checkpoint)
    if raw is not None:
        config = read_model_config(raw)
        for key in ("model_type", "num_hidden_layers"):
            if getattr(manifest.model, key) != getattr(config, key):
                line = f"{key} is {getattr(manifest.model, key)!r}, {CONFIG} says {getattr(config, key)!r}"
                yield Finding("layers", MANIFEST, line)
    if manifest.scheme != scheme_name(checkpoint.layers):
        line = f"its scheme is {manifest.scheme}, its layers make it {scheme_name(checkpoint.layers)}"
        yield Finding("scheme", MANIFEST, line)
    there = layer_entries(checkpoint.layers)
    indexes, real_indexes = ([layer.index for layer in layers] for layers in (manifest.layers, there))
    if indexes != real_indexes:
        yield Finding("layers", MANIFEST, f"its layers are {indexes}, its tensors are of {real_indexes}")
        return
    for said, real in zip(manifest.layers, there, strict=True):
        ours, theirs = ({"activation": layer.activation, **layer.linears} for layer in (said, real))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                line = f"{key} of layer {said.index} is {ours.get(key)}, its tensors make it {theirs.get(key)}"
                yield Finding("scheme", MANIFEST, line)


def _cut(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The manifest's tensors and slices against those of a cut of the set's own weights."""
    for name in sorted({piece.tensor for s in manifest.shards for t in s.tensors for piece in t.slices}):
        if parse_dense(name) is None:
            yield Finding("cut", MANIFEST, f"{name} is sliced, and is no DenseFFN tensor: it must not be in a set")
    try:
        plan = plan_of(manifest, checkpoint, manifest.layout)
    except AlignmentError as error:
        yield Finding("cut", MANIFEST, str(error))
        return
    if manifest.padding != plan.padding:
        yield Finding("cut", MANIFEST, f"padding is {manifest.padding}, the sizes make it {plan.padding}")
    for shard, planned in zip(manifest.shards, plan.shards, strict=True):
        said = {tensor.name: _spelt(tensor) for tensor in shard.tensors}
        real = {tensor.name: _spelt(tensor) for tensor in planned.tensors}
        for name in sorted(said.keys() | real.keys()):
            where = f"{shard.file}: {name}"
            if name not in real:
                yield Finding("cut", where, f"{MANIFEST} has it, cutting the set's weights gives none of that name")
            elif name not in said:
                yield Finding("cut", where, f"missing; a cut has it: {real[name]}")
            elif said[name] != real[name]:
                yield Finding("cut", where, f"is {said[name]}, a cut gives {real[name]}")


def _spelt(tensor: ShardTensor | PlannedTensor) -> str:
    """A tensor as one line, which is what is compared."""
    slices = ", ".join(f"{s.tensor} dim {s.dim} {s.start}..{s.stop} at {s.at}" for s in tensor.slices) or "zeros"
    same = f", the same as {', '.join(tensor.same_as)}" if tensor.same_as else ""
    return f"{tensor.dtype} {list(tensor.shape)} of {slices}{same}"
