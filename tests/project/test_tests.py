"""What the tests themselves must keep to."""

import re

import pytest

from tests.support.paths import ROOT

pytest_plugins = ["pytester"]


def test_no_test_module_imports_another() -> None:
    """What several share lies in tests/support, or in a module of the room that holds no tests."""
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        found = re.findall(r"^\s*from (tests\.(?:\w+\.)*(?:test_\w+|conftest)) import", path.read_text(), re.MULTILINE)
        assert not found, f"{path.relative_to(ROOT)} imports {found[0]}"


def test_marks_are_set_by_what_a_test_uses(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(
        """
        import subprocess
        from tests.support import forks
        from tests.support.hub_server import serving
        from tests.support.running import reshard_process

        def test_quick(): pass
        def test_itself(): subprocess.run(["true"])
        def test_by_a_helper(): reshard_process("--help")
        def test_by_a_module(): forks.run()
        def test_by_a_fixture(ranks): pass
        def test_by_a_server():
            def inside(): serving(None)
        """
    )
    show = """
        def pytest_collection_finish(session):
            for item in session.items:
                print("marks of", item.name, *[mark.name for mark in item.iter_markers()])
    """
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    pytester.makeconftest(conftest + "\n".join(line[8:] for line in show.splitlines()))
    pytester.makeini("[pytest]\nmarkers =\n processes\n network\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    result = pytester.runpytest_subprocess("--collect-only", "-s", "-p", "no:cacheprovider")
    of = {line.split()[2]: line.split()[3:] for line in result.outlines if line.startswith("marks of")}
    assert of == {
        "test_quick": [],
        "test_itself": ["processes"],
        "test_by_a_helper": ["processes"],
        "test_by_a_module": ["processes"],
        "test_by_a_fixture": ["processes"],
        "test_by_a_server": ["network"],
    }
