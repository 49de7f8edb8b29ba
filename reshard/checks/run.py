"""One target, checked: a checkpoint or a shard set at an address, or a config.json alone."""

from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeGuard

from reshard.checkpoint.config_only import config_checkpoint, read_config
from reshard.checkpoint.description import Checkpoint
from reshard.checks.cut import check_cut, no_cut
from reshard.checks.device import check_kernels, check_npu
from reshard.checks.finding import Finding
from reshard.checks.layers import check_layers, config_of
from reshard.checks.report import Report, Request, not_checked
from reshard.checks.serving import check_part, check_serving, option_size, setup_of
from reshard.checks.shardset import check_origin, check_set, check_size, plan_of
from reshard.convert.rules import converted
from reshard.errors import AlignmentError, ReshardError, UsageError
from reshard.manifest import Manifest
from reshard.model.config import has_experts
from reshard.model.naming import parse_shard_file
from reshard.model.parts import DENSE_FFN
from reshard.plan.plan import Ways, make_plan
from reshard.source.address import shown
from reshard.source.base import Source
from reshard.source.files import read_checkpoint
from reshard.source.open import describe, open_part, open_source
from reshard.source.retry import Notify


def check_source(address: str, request: Request, notify: Notify = lambda line: None) -> Report:
    """A checkpoint's or a shard set's report. notify: takes a line for each wait after a server's fault.

    Raises SourceError where it cannot be read, UsageError where the request does not go with what it is.
    """
    with open_source(address, request.revision, index=request.index, notify=notify) as source:
        if any(parse_shard_file(name) for name in source.files()):
            if request.scheme is not None and request.against is None:
                raise UsageError(f"--scheme goes with a checkpoint: {address} is a shard set, and its manifest says")
            if request.index is not None and request.against is None:
                raise UsageError(f"--index goes with a checkpoint; {address} is a shard set")
            set_findings = _set(source, request, address, notify)
            source.check_unchanged()
            return Report(shown(address), "shard set", tuple(set_findings))
        if request.against is not None:
            raise UsageError(f"--against goes with a shard set, which {address} is not")
        findings, checkpoint = check_layers(
            lambda: converted(read_checkpoint(source, request.scheme, request.part or DENSE_FFN), request.weights)
        )
        source.check_unchanged()
    return Report(shown(address), "checkpoint", (*findings, *_cuts(checkpoint, request)))


def check_config(path: str, request: Request) -> Report:
    """A config.json's report: of the checkpoint that it promises. Raises SourceError where it cannot be read."""
    if request.against is not None:
        raise UsageError(f"--against goes with a shard set, which {path} is not")
    if request.revision is not None:
        raise UsageError(f"--revision goes with a hub repository, which {path} is not")
    if request.index is not None:
        raise UsageError(f"--index goes with a checkpoint's files, which {path} is not")
    config = read_config(path)
    findings, checkpoint = check_layers(
        lambda: converted(config_checkpoint(config, path, request.scheme, request.part or DENSE_FFN), request.weights)
    )
    return Report(path, "config", (*findings, *_cuts(checkpoint, request)), file=path)


def _cuts(checkpoint: Checkpoint | None, request: Request) -> list[Finding]:
    """Each size that is asked for, the option's among them, and the setup."""
    found: list[Finding] = []
    if _on_npu(checkpoint, request):
        found.append(check_kernels(checkpoint))
    setup = _setup(checkpoint, request)
    wrong = [finding.check for finding in setup if finding.severity == "error"]
    option = option_size(request.serving)
    # A value that may not stay is not judged as a size: two lines would advise on it, by different rules.
    sizes = tuple(dict.fromkeys((*request.tp_sizes, *((option,) if option and not wrong else ()))))
    if checkpoint is None:
        found += no_cut("the layers could not be described")
    elif not sizes:
        found += no_cut(f"see {wrong[0]}" if option else "no size to cut for; give --tp")
    else:
        for size in sizes:
            among = setup_of(request.serving, _moe(checkpoint)).sizes if request.serving and size == option else None
            found += _cut(checkpoint, size, request, among)
    return found + setup


def _setup(checkpoint: Checkpoint | None, request: Request) -> list[Finding]:
    """The setup, where one is given; what is advised for it can be cut."""

    def can_be_cut(size: int) -> bool:
        return checkpoint is None or _passes(_cut(checkpoint, size, request))

    return check_serving(request.serving, _moe(checkpoint), None, can_be_cut) if request.serving is not None else []


def _cut(checkpoint: Checkpoint, tp_size: int, request: Request, among: Container[int] | None = None) -> list[Finding]:
    """among: the sizes that may be advised, where not every one that can be cut."""

    def takes(size: int) -> bool:
        return (among is None or size in among) and _passes(_cut(checkpoint, size, request))

    findings, plan = check_cut(checkpoint, tp_size, request.pad, Ways(takes))
    return findings + check_npu(checkpoint, plan) if plan is not None and _on_npu(checkpoint, request) else findings


def _on_npu(checkpoint: Checkpoint | None, request: Request) -> TypeGuard[Checkpoint]:
    """Whether it runs on kernels that are called here: other parts than the DenseFFN run on the engine's."""
    return checkpoint is not None and checkpoint.part is DENSE_FFN and request.device == "npu"


def _set(source: Source, request: Request, address: str, notify: Notify) -> list[Finding]:
    if request.weights != "keep" or request.pad:
        raise UsageError(f"--weights and --pad go with a checkpoint; {address} is cut already")
    findings, manifest, checkpoint = check_set(source)
    if manifest is None:
        wanted = {"size": request.tp_sizes, "source": request.against, "option": request.serving}
        asked = tuple(check for check, value in wanted.items() if value)
        return [*findings, *not_checked(asked, "see manifest")]
    if request.part not in (None, manifest.what):
        raise UsageError(f"{address}: is a set of {manifest.part}, {request.part.key} is asked for")

    def takes(size: int) -> bool:
        return checkpoint is None or _can_be_re_sharded(manifest, checkpoint, size, request)

    findings += check_size(manifest, checkpoint, request.tp_sizes, takes)
    if request.against is not None:
        findings += _origin(manifest, request.against, request, notify)
    if _on_npu(checkpoint, request):
        findings.append(check_kernels(checkpoint))
        try:
            findings += check_npu(checkpoint, plan_of(manifest, checkpoint, "fused", (0,)))
        except AlignmentError as error:  # a set that keeps gate and up apart may be one that cannot be stacked
            findings.append(Finding("forward", "", f"not checked: {error}", "skipped"))
    if request.serving is not None:
        ours = manifest.tp_size if manifest.what is DENSE_FFN else None
        moe = _moe(checkpoint)
        findings += check_serving(request.serving, moe, ours, takes, alone=request.alone)
        findings += check_part(request.serving, manifest, moe, takes, request.alone)
    return findings


def _can_be_re_sharded(manifest: Manifest, checkpoint: Checkpoint, tp_size: int, request: Request) -> bool:
    """Whether the set can be cut again, in its layout, for a size that its device takes."""
    try:
        make_plan(checkpoint, tp_size, manifest.layout, tp_ranks=())
        if not _on_npu(checkpoint, request):
            return True
        fused = make_plan(checkpoint, tp_size, tp_ranks=(0,))
    except AlignmentError:
        return False
    return _passes(check_npu(checkpoint, fused))


def _passes(findings: Iterable[Finding]) -> bool:
    return not any(finding.severity == "error" for finding in findings)


def _origin(manifest: Manifest, against: str, request: Request, notify: Notify) -> list[Finding]:
    """What the set was cut from; where that cannot be read, what was found of the set itself still stands."""
    try:
        with open_part(against, manifest.what, index=request.index, notify=notify)[1] as original:
            found = check_origin(manifest, describe(original, request.scheme, manifest.what), shown(against))
            original.check_unchanged()
            return found
    except UsageError:
        raise
    except ReshardError as error:
        return [Finding("input", "--against", str(error))]


def _moe(checkpoint: Checkpoint | None) -> bool | None:
    config: Mapping[str, Any] | None = config_of(checkpoint) if checkpoint is not None else None
    return has_experts(config) if config is not None else None
