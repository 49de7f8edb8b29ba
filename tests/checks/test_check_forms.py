"""Reports in each form: JUnit against its schema, GitHub's annotations as GitHub unescapes them, one JSON document."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from hypothesis import given
from hypothesis import strategies as st

from reshard.checks.finding import Finding
from reshard.checks.forms import document, github, junit, text
from reshard.checks.report import Report
from reshard.safe_text import safe_line
from tests.support.paths import CONFIGS, DATA
from tests.support.running import reshard

R1 = CONFIGS / "deepseek-r1.json"
SCHEMA = xmlschema.XMLSchema(DATA / "junit" / "junit-10.xsd")

_severities = st.sampled_from(["ok", "skipped", "warning", "error"])
_findings = st.builds(Finding, st.sampled_from(["input", "cut", "option-size"]), st.text(), st.text(), _severities)
_reports = st.lists(
    st.builds(
        Report,
        st.text(min_size=1),
        st.sampled_from(["config", "checkpoint", "shard set", None]),
        st.lists(_findings, min_size=1).map(tuple),
        st.none() | st.text(min_size=1),
    ),
    max_size=3,
)


@given(_reports, st.booleans())
def test_junit_is_valid_whatever_names_hold(reports: list[Report], strict: bool) -> None:
    root = ET.fromstring(junit(reports, strict))
    SCHEMA.validate(root)
    findings = [finding for report in reports for finding in report.findings]
    bad = [f for f in findings if f.severity == "error" or (strict and f.severity == "warning")]
    assert root.get("tests") == str(len(findings)) == str(len(root.findall(".//testcase")))
    assert (
        root.get("failures") == str(len(root.findall(".//failure"))) == str(len([f for f in bad if f.check != "input"]))
    )
    assert root.get("errors") == str(len(root.findall(".//error"))) == str(len([f for f in bad if f.check == "input"]))
    assert len(root.findall(".//skipped")) == len([f for f in findings if f.severity == "skipped"])
    for suite in root:
        names = [case.get("name") for case in suite]
        assert len(set(names)) == len(names)


def test_junit_of_a_command() -> None:
    done = reshard("check", R1, CONFIGS / "llama-3.1-8b.json", "--tp", "8,5", "--format", "junit")
    assert done.code == 3
    root = ET.fromstring(done.out)
    SCHEMA.validate(root)
    assert [suite.get("name") for suite in root] == [str(R1), str(CONFIGS / "llama-3.1-8b.json")]
    assert {key: root[0].get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    (case,) = (case for case in root[0] if case.find("failure") is not None)
    assert case.get("name") == "divides: tp 5"
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("type") == "divides"
    assert "dim 0 = 18432 over tp 5" in str(failure.get("message"))


def test_cases_are_told_apart_and_every_encoding_carries_them() -> None:
    wheres = ("é", "é", "é (2)", "\n", "\\n")
    report = Report("ü", None, tuple(Finding("cut", where, "x") for where in wheres))
    written = junit([report], False)
    assert written.isascii()
    root = ET.fromstring(written)
    assert [case.get("name") for case in root[0]] == [
        "cut: é",
        "cut: é (2)",
        "cut: é (2) (2)",
        "cut: \\n",
        "cut: \\n (2)",
    ]
    assert root[0].get("name") == "ü"


def test_junit_has_an_error_for_what_cannot_be_read(tmp_path: Path) -> None:
    done = reshard("check", tmp_path / "none", "--format", "junit")
    assert done.code == 1
    root = ET.fromstring(done.out)
    SCHEMA.validate(root)
    assert root.get("errors") == "1"
    assert [element.get("type") for element in root.findall(".//error")] == ["input"]


def test_the_schema_refuses_what_is_no_junit() -> None:
    """That the validation can fail."""
    assert not SCHEMA.is_valid(ET.fromstring('<testsuites><testsuite name="x"/></testsuites>'))


# As actions/runner reads them: ActionCommand.TryParseV2 and its tables of escapes.
_COMMAND = re.compile(r"::(?P<level>error|warning|notice) (?P<properties>[^:]*)::(?P<data>.*)")
_DATA = (("%0D", "\r"), ("%0A", "\n"), ("%25", "%"))
_PROPERTY = (("%3A", ":"), ("%2C", ","))


def unescaped(value: str, table: tuple[tuple[str, str], ...]) -> str:
    for written, meant in table:
        value = value.replace(written, meant)
    return value


def annotation(line: str) -> tuple[str, dict[str, str], str]:
    """Level, properties, message."""
    match = _COMMAND.fullmatch(line)
    assert match, line
    pairs = (pair.split("=", 1) for pair in match["properties"].split(","))
    properties = {key: unescaped(value, _PROPERTY + _DATA) for key, value in pairs}
    return match["level"], properties, unescaped(match["data"], _DATA)


@given(_reports, st.booleans())
def test_annotations_come_back_as_they_were(reports: list[Report], strict: bool) -> None:
    *lines, last = github(reports, strict)
    assert not last.startswith("::")
    got = sorted(annotation(line)[2] for line in lines)
    shown = [(report, f) for report in reports for f in report.findings if f.severity != "ok"]
    assert got == sorted(safe_line(f.line if report.file else f"{report.target}: {f.line}") for report, f in shown)
    levels = [annotation(line)[0] for line in lines]
    assert levels == sorted(levels, key=["error", "warning", "notice"].index), "GitHub shows the first ten"
    assert {a["file"] for _, a, _ in map(annotation, lines) if "file" in a} == {
        safe_line(r.file) for r, _ in shown if r.file
    }
    assert all(line.isprintable() for line in lines)


def test_annotations_of_a_command() -> None:
    done = reshard("check", "--config", R1, "--tp", "5", "--device", "npu", "--format", "github")
    assert done.code == 3
    first, second, third, last = done.out.splitlines()
    level, properties, message = annotation(first)
    assert (level, properties) == ("error", {"file": str(R1), "title": "reshard check: divides"})
    assert message.startswith("tp 5: model.layers.0.mlp.gate_proj.weight: dim 0 = 18432 over tp 5")
    assert first.startswith(f"::error file={R1},title=reshard check%3A divides::tp 5: model")
    assert [annotation(line)[:2] for line in (second, third)] == [
        ("warning", {"file": str(R1), "title": "reshard check: kernels"}),
        ("notice", {"file": str(R1), "title": "reshard check: blocks"}),
    ]
    assert last == "6 checks: 3 ok, 1 failed, 1 with a warning, 1 not made"


def test_a_percent_sign_and_a_newline() -> None:
    report = Report("a,b:c", None, (Finding("cut", "", "50%\r\n::error::injected"),), "x,y:z%")
    line = next(iter(github([report], False)))
    assert line == "::error file=x%2Cy%3Az%25,title=reshard check%3A cut::50%25\\r\\n::error::injected"


def test_strict_makes_errors_of_warnings() -> None:
    for form, says in (("github", "::error file="), ("junit", '<failure type="kernels"')):
        done = reshard("check", R1, "--tp", 8, "--device", "npu", "--strict", "--format", form)
        assert done.code == 3
        assert says in done.out


@given(_reports)
def test_text_is_a_line_for_each_finding(reports: list[Report]) -> None:
    lines = list(text(reports))
    assert len(lines) == sum(1 + len(report.findings) for report in reports) + 2


@given(_reports, st.booleans())
def test_the_document_has_everything(reports: list[Report], strict: bool) -> None:
    made = json.loads(json.dumps(document(reports, strict)))
    assert [t["findings"] for t in made["targets"]] == [[vars(f) for f in report.findings] for report in reports]
    assert made["ok"] == all(target["ok"] for target in made["targets"])


def test_the_document_s_shape() -> None:
    """Programs read it: a key that goes or is renamed breaks them."""
    finding = {"check": "size", "where": "tp 2", "message": "m", "severity": "warning"}
    unreadable = {"check": "input", "where": "", "message": "gone", "severity": "error"}
    reports = [
        Report("a", "shard set", (Finding("size", "tp 2", "m", "warning"),)),
        Report("b", None, (Finding("input", "", "gone"),), "b"),
    ]
    assert document(reports, False) == {
        "ok": False,
        "strict": False,
        "targets": [
            {"target": "a", "kind": "shard set", "ok": True, "findings": [finding]},
            {"target": "b", "kind": None, "ok": False, "findings": [unreadable]},
        ],
    }
    assert document(reports[:1], True)["ok"] is False


@pytest.mark.parametrize("form", ["human", "json", "junit", "github"])
def test_wrong_usage_is_2_in_every_form(form: str) -> None:
    done = reshard("check", R1, "--tp", "x", "--format", form)
    assert done.code == 2
    assert done.err.startswith("error: --tp x")
    assert (done.out != "") == (form == "json")
