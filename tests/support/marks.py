"""Which marks a test gets by what it uses: its own code, its fixtures, and the helpers that these call."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

USES = {
    "processes": {"subprocess", "runpytest_subprocess", "tests.support.forks", "tests.support.distributed"},
    "network": {"ThreadingHTTPServer", "tests.support.hub_server", "tests.support.s3"},
}
"""By a name in the code, or by the module that a name in the code is of."""


def set_marks(item: pytest.Function, seen: dict[Any, frozenset[str]]) -> None:
    """Mark a test. seen: what was found of helpers before."""
    fixtures = [definition.func for of_name in item._fixtureinfo.name2fixturedefs.values() for definition in of_name]
    for function in (item.function, *fixtures):
        for mark in sorted(_marks(function, seen)):
            item.add_marker(mark)


def _marks(used: Any, seen: dict[Any, frozenset[str]]) -> frozenset[str]:
    if used not in seen:
        seen[used] = frozenset()  # what calls itself adds nothing
        names = {name for code in _codes(used) for name in code.co_names}
        scope = vars(sys.modules[used.__module__])
        values = [scope[name] for name in names if name in scope]
        for module in [value for value in values if isinstance(value, types.ModuleType)]:
            values += [value for name, value in vars(module).items() if name in names]
        ours = [value for value in values if str(getattr(value, "__module__", "")).startswith("tests.")]
        of = names | {value.__module__ for value in ours}
        found = [mark for mark, needs in USES.items() if needs & of]
        seen[used] = frozenset(found).union(
            *(_marks(v, seen) for v in ours if isinstance(v, types.FunctionType | type))
        )
    return seen[used]


def _codes(used: Any) -> Iterator[types.CodeType]:
    """The code of a function, or of a class's methods, and what is defined in it."""
    of = [getattr(value, "__func__", value) for value in vars(used).values()] if isinstance(used, type) else [used]
    waiting = [function.__code__ for function in of if isinstance(function, types.FunctionType)]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
