"""A pytest fixture, `reshard_check`. pytest loads this file wherever reshard is installed, so it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from reshard.checks.report import Report


@pytest.fixture(scope="session")
def reshard_check() -> Callable[..., Report]:
    """`reshard check` for a test: `reshard.check` with `strict` beside its arguments.

    A failed check fails the test with its lines; the report is returned.
    A target that cannot be read raises reshard.errors.SourceError, a value that is none reshard.errors.UsageError.
    """
    import reshard
    from reshard.safe_text import safe_line

    def check(path: Any = None, *, strict: bool = False, **options: Any) -> Report:
        __tracebackhide__ = True
        report = reshard.check(path, **options)
        if report.failed(strict):
            wrong = [*report.of("error"), *(report.of("warning") if strict else ())]
            lines = [f"reshard check {report.target}:", *(f"{finding.check}: {finding.line}" for finding in wrong)]
            pytest.fail("\n".join(map(safe_line, lines)), pytrace=False)
        return report

    return check
