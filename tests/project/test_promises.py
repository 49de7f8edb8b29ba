"""docs/promises.md: each promise names tests that there are."""

import ast
import re

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text()
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_is_named_exists() -> None:
    named = _NAMED.findall(PAGE)
    assert len(named) > 50
    functions = {
        file: {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        for file in {file for file, _ in named}
        if (ROOT / file).is_file()
    }
    assert [f"{file}::{name}" for file, name in named if name not in functions.get(file, set())] == []


def test_every_promise_names_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert len(rows) > 30
    assert [row for row in rows if not _NAMED.search(row.split(" | ")[1])] == []


def test_who_reads_on_security_is_sent_there() -> None:
    assert "(docs/promises.md)" in (ROOT / "SECURITY.md").read_text()
