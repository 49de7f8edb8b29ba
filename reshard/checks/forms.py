"""Reports as text, as one JSON document, as JUnit XML, as GitHub's workflow annotations."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from reshard.checks.finding import Finding, Severity
from reshard.checks.report import Report
from reshard.safe_text import safe_line

_WORDS = {"ok": "ok", "skipped": "skipped", "warning": "warning", "error": "FAILED"}
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "skipped": "notice"}
_SUITE = "reshard check"


def text(reports: Sequence[Report]) -> Iterator[str]:
    """Lines for people: a line for each finding, and a count."""
    for report in reports:
        yield f"{report.target}: {report.kind}" if report.kind else report.target
        width = max(len(finding.check) for finding in report.findings)
        for finding in report.findings:
            yield f"  {_WORDS[finding.severity]:<7}  {finding.check:<{width}}  {finding.line}"
    yield ""
    yield summary(reports)


def summary(reports: Sequence[Report]) -> str:
    """How many findings of each severity."""
    count = Counter(finding.severity for report in reports for finding in report.findings)
    parts = [f"{count['ok']} ok"]
    parts += [f"{count['error']} failed"] if count["error"] else []
    parts += [f"{count['warning']} with a warning"] if count["warning"] else []
    parts += [f"{count['skipped']} not made"] if count["skipped"] else []
    total = count.total()
    return f"{total} {'check' if total == 1 else 'checks'}: {', '.join(parts)}"


def document(reports: Sequence[Report], strict: bool) -> dict[str, Any]:
    """For programs."""
    return {
        "ok": not any(report.failed(strict) for report in reports),
        "strict": strict,
        "targets": [
            {
                "target": report.target,
                "kind": report.kind,
                "ok": not report.failed(strict),
                "findings": [vars(finding) for finding in report.findings],
            }
            for report in reports
        ],
    }


def junit(reports: Sequence[Report], strict: bool) -> str:
    """JUnit XML, of the schema that Jenkins' xUnit plugin has: a suite for each target, a case for each finding.

    A warning is no failure unless strict: it goes to the case's output. What cannot be read is an error.
    """
    root = ET.Element("testsuites", name=_SUITE)
    totals: Counter[str] = Counter()
    for report in reports:
        suite = ET.SubElement(root, "testsuite", name=safe_line(report.target))
        counts: Counter[str] = Counter(tests=len(report.findings))
        names: set[str] = set()
        for finding in report.findings:
            plain = name = safe_line(f"{finding.check}: {finding.where}" if finding.where else finding.check)
            number = 1
            while name in names:  # a reader of results tells cases apart by their names
                number += 1
                name = f"{plain} ({number})"
            names.add(name)
            case = ET.SubElement(suite, "testcase", classname="reshard.checks", name=name)
            counts[_add_result(case, finding, strict)] += 1
        keys = ("tests", "failures", "errors", "skipped")
        suite.attrib |= {key: str(counts[key]) for key in keys}
        totals += counts
    root.attrib |= {key: str(totals[key]) for key in ("tests", "failures", "errors")}
    ET.indent(root)
    # Other characters as references: right, whatever stdout is encoded in.
    written: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=True)
    return written.decode()


def _add_result(case: ET.Element, finding: Finding, strict: bool) -> str:
    """Add what a case came to; the name under which it is counted."""
    line = safe_line(finding.line)
    if finding.severity == "skipped":
        ET.SubElement(case, "skipped", message=line)
        return "skipped"
    if finding.severity == "error" or (strict and finding.severity == "warning"):
        unreadable = finding.check == "input"
        element = ET.SubElement(case, "error" if unreadable else "failure", type=finding.check, message=line)
        element.text = line
        return "errors" if unreadable else "failures"
    ET.SubElement(case, "system-out").text = f"warning: {line}" if finding.severity == "warning" else line
    return "passed"


def github(reports: Sequence[Report], strict: bool) -> Iterator[str]:
    """Workflow commands, errors first: GitHub shows only the first few of a step. What is right is counted only.

    https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
    """
    for severity, level in _LEVELS.items():
        shown = "error" if strict and level == "warning" else level
        for report in reports:
            for finding in report.of(severity):
                place = f"file={_property(safe_line(report.file))}," if report.file else ""
                title = _property(f"{_SUITE}: {finding.check}")
                what = safe_line(finding.line if report.file else f"{report.target}: {finding.line}")
                yield f"::{shown} {place}title={title}::{_data(what)}"
    yield summary(reports)


def _data(value: str) -> str:
    """As GitHub's own toolkit escapes a message."""
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    """As it escapes a property."""
    return _data(value).replace(":", "%3A").replace(",", "%2C")
