"""`reshard check` in tests: run, and its findings picked out."""

import json
from typing import Any

from reshard.checks.serving_option import OPTION
from tests.support.running import Done, reshard


def findings(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and every finding of every target."""
    done = reshard("check", *arguments, "--format", "json")
    return done.code, [finding for target in done.document["targets"] for finding in target["findings"]]


def failed(*arguments: object) -> list[tuple[str, str]]:
    """(check, where and message) of what failed, with the exit code that it must end with."""
    code, found = findings(*arguments)
    wrong = [(f["check"], f"{f['where']}: {f['message']}") for f in found if f["severity"] == "error"]
    unreadable = any(check == "input" for check, _ in wrong)
    assert code == (1 if unreadable else 3 if wrong else 0)
    return wrong


def of(found: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    """The findings of one check."""
    return [finding for finding in found if finding["check"] == check]


def usage(*arguments: object) -> str:
    """The line of a wrong usage."""
    done: Done = reshard("check", *arguments)
    assert (done.code, done.out) == (2, "")
    return done.err


def setup(option: object, data: int, tensor: int = 1) -> list[object]:
    """The options of a serving setup."""
    additional = {} if option is None else {OPTION: option}
    sizes = ["--data-parallel-size", data, "--tensor-parallel-size", tensor]
    return ["--additional-config", json.dumps(additional), *sizes]
