"""`reshard check`."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reshard.cli.options import Debug, Index, Pad, Revision, Scheme, Weights, parse_sizes
from reshard.cli.output import Output
from reshard.cli.parts import OnePart, parse_part

if TYPE_CHECKING:
    from reshard.checks.report import Report, Request

_UNREADABLE, _FAILED = 1, 3
_ADDITIONAL = "--additional-config"


def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Checkpoints or shard sets; a .json file is taken as with --config."),
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", metavar="FILE", help="A config.json, with no checkpoint at hand.")
    ] = None,
    tp: Annotated[
        str | None,
        typer.Option("--tp", metavar="N[,N..]", help="Group sizes to cut for; of a shard set, those it may have."),
    ] = None,
    scheme: Scheme = None,
    weights: Weights = "keep",
    pad: Pad = False,
    against: Annotated[
        str | None, typer.Option("--against", metavar="SOURCE", help="What the shard set must have been cut from.")
    ] = None,
    device: Annotated[Literal["cpu", "npu"], typer.Option(help="npu: kernels, tiles, limits, torch_npu.")] = "cpu",
    additional_config: Annotated[
        str | None,
        typer.Option(_ADDITIONAL, metavar="JSON", help="The engine's, with denseffn_tensor_parallel_size in it."),
    ] = None,
    data_parallel_size: Annotated[int | None, typer.Option(help="The engine's; 1 where it is left out.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="The engine's; 1 where it is left out.")] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option(help="The engine's; 1 where it is left out.")] = None,
    part: OnePart = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="The engine's.")] = False,
    kv_role: Annotated[
        Literal["kv_producer", "kv_consumer", "kv_both"] | None,
        typer.Option(help="In the engine's --kv-transfer-config; none where that is left out."),
    ] = None,
    revision: Revision = None,
    index: Index = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail, too.")] = False,
    form: Annotated[
        Literal["human", "json", "junit", "github"], typer.Option("--format", help="What stdout carries.")
    ] = "human",
    debug: Debug = False,
) -> None:
    """Check shapes, cuts, shard sets and serving setups, for CI.

    From headers and arithmetic alone; the cut is checked as split makes it.
    """
    output = Output(form, quiet=True, debug=debug)
    with output.errors():
        from reshard import api
        from reshard.checks.report import Request
        from reshard.errors import UsageError

        given = [*((path, _is_config(path)) for path in paths or ()), *((file, True) for file in config or ())]
        if not given:
            raise UsageError("nothing to check: give a PATH, or --config FILE")
        serving_sizes = (data_parallel_size, tensor_parallel_size, pipeline_parallel_size)
        serving = api.serving(_parsed(additional_config), *serving_sizes, enforce_eager=enforce_eager, kv_role=kv_role)
        sizes, what = parse_sizes(tp), parse_part(part)
        request = Request(sizes, scheme, weights, pad, against, device, serving, revision, index, what)
        reports = [report for target, is_config in given for report in _reports(output, target, is_config, request)]
        _write(output, form, reports, strict)
    if any(report.unreadable for report in reports):
        raise typer.Exit(_UNREADABLE)
    if any(report.failed(strict) for report in reports):
        raise typer.Exit(_FAILED)


def _is_config(path: str) -> bool:
    """A file that is missing is one too: `models/r1.json` would be a hub repository's name else."""
    return path.endswith(".json") and "://" not in path and not os.path.isdir(path)


def _reports(output: Output, target: str, is_config: bool, request: "Request") -> "list[Report]":
    """A target's report, or those of sets of several parts that lie there, and of what lacks among them."""
    from reshard.checks.finding import Finding
    from reshard.checks.report import Report
    from reshard.source.address import shown
    from reshard.source.open import SeveralSets

    try:
        return [_report(output, target, is_config, request)]
    except SeveralSets as found:
        each = replace(request, alone=len(found.addresses) == 1)
        reports = [_report(output, one, is_config, each, within=True) for one in found.addresses.values()]
        if line := found.absent():
            reports.append(Report(shown(target), "shard set", (Finding("parts", "", line),)))
        return reports


def _report(output: Output, target: str, is_config: bool, request: "Request", *, within: bool = False) -> "Report":
    """A target's report; what cannot be read is one too, so that the others are checked all the same.

    within: it lies among sets of several parts. Raises SeveralSets where it holds some itself, and does not.
    """
    from reshard.checks.finding import Finding
    from reshard.checks.report import Report
    from reshard.checks.run import check_config, check_source
    from reshard.errors import SourceError, UsageError, as_reshard_error
    from reshard.source.address import shown
    from reshard.source.open import SeveralSets

    try:
        report = check_config(target, request) if is_config else check_source(target, request, output.warn)
    except Exception as error:
        if isinstance(error, UsageError) or (isinstance(error, SeveralSets) and not within):
            raise
        message = output.error(as_reshard_error(error), of=target)
        return Report(shown(target), None, (Finding("input", "", message),), target if is_config else None)
    for finding in report.findings:
        if finding.check == "input":
            output.error(SourceError(finding.line), of=target)
    return report


def _write(output: Output, form: str, reports: "list[Report]", strict: bool) -> None:
    from reshard.checks import forms

    if form == "junit":
        output.escaped(forms.junit(reports, strict))
    elif form == "github":
        for line in forms.github(reports, strict):
            output.escaped(line)
    else:
        output.document(forms.document(reports, strict), lambda: forms.text(reports))


def _parsed(additional: str | None) -> dict[str, Any] | None:
    """The additional config, if one is given. Raises UsageError where it is no JSON object."""
    from reshard.errors import UsageError
    from reshard.strict_json import parse_json

    if additional is None:
        return None
    try:
        value = parse_json((additional or "{}").encode(errors="surrogateescape"), _ADDITIONAL, UsageError, finite=False)
    except UsageError as error:
        raise UsageError(str(error).removesuffix("; copy or download it again")) from error
    if not isinstance(value, dict):
        raise UsageError(f"{_ADDITIONAL} is {additional}: give a JSON object, {{}} for none of its options")
    return value
