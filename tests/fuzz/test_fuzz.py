"""A few mutations, always the same; `make fuzz` runs thousands."""

import functools
from pathlib import Path

from tests.fuzz.cases import make_case
from tests.fuzz.run import run


def test_a_hundred_mutations(tmp_path: Path) -> None:
    summary = run(0, range(100), tmp_path, 1, make=functools.partial(make_case, most=2))
    assert not summary.faults, "\n".join(map(str, summary.faults))
    assert summary.cases == 100
    assert summary.commands["refused"] > 50
    assert summary.commands["proven"] > 10
