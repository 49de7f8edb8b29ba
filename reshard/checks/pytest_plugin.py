"""A pytest fixture, `reshard_check`. pytest loads this file wherever reshard is installed, so it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from reshard.checks.report import Device, Report, Weights


@pytest.fixture(scope="session")
def reshard_check() -> Callable[..., Report]:
    """`reshard check` for a test: call it with a checkpoint's or shard set's address, or with `config=FILE`.

    The arguments are the command's options. A failed check fails the test with its lines; the report is returned.
    A target that cannot be read raises reshard.errors.SourceError, a value that is none reshard.errors.UsageError.
    """
    from reshard.checks.report import Request, Serving
    from reshard.checks.run import check_config, check_source
    from reshard.errors import UsageError

    def check(
        path: Any = None,
        *,
        config: Any = None,
        tp: int | tuple[int, ...] = (),
        scheme: str | None = None,
        weights: Weights = "keep",
        pad: bool = False,
        against: Any = None,
        device: Device = "cpu",
        additional_config: Mapping[str, Any] | None = None,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        revision: str | None = None,
        index: str | None = None,
        strict: bool = False,
    ) -> Report:
        __tracebackhide__ = True
        if (path is None) == (config is None):
            raise UsageError("reshard_check: give a path, or config=")
        sizes = (data_parallel_size, tensor_parallel_size, pipeline_parallel_size)
        said = (additional_config, *sizes)
        serving = Serving(
            {} if additional_config is None else additional_config, *(1 if size is None else size for size in sizes)
        )
        request = Request(
            tp_sizes=(tp,) if isinstance(tp, int) else tuple(tp),
            scheme=scheme,
            weights=weights,
            pad=pad,
            against=None if against is None else str(against),
            device=device,
            revision=revision,
            index=index,
            serving=None if all(value is None for value in said) else serving,
        )
        report = check_source(str(path), request) if config is None else check_config(str(config), request)
        if report.failed(strict):
            wrong = [*report.of("error"), *(report.of("warning") if strict else ())]
            lines = [f"{finding.check}: {finding.line}" for finding in wrong]
            pytest.fail("\n".join([f"reshard check {report.target}:", *lines]), pytrace=False)
        return report

    return check
