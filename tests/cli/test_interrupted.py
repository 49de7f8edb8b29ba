"""Commands that write nothing end at the first Ctrl-C: no thread that reads or hashes, and no server, is waited for."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.hub_server import COMMIT, Asked, Handler, Hub, serving
from tests.support.running import Done, interrupted, split

# What is read or dealt out has no end, from the phase that is named on; the second time round says so.
ENDLESS = """
import contextlib
import sys
import reshard.api as api
from reshard.source.base import Source
from reshard.verification.reference import Grid

begun, said = [], ["again"]

def from_now_on(name):
    real = getattr(api, name)
    def run(*arguments, **options):
        begun.append(name)
        return real(*arguments, **options)
    setattr(api, name, run)

def endless(owner):
    real = owner.blocks
    def run(*arguments):
        yield from real(*arguments)
        while begun and (not {least} or arguments[-1] > {least}):
            with contextlib.suppress(IndexError):  # said already
                print(said.pop(), file=sys.stderr)
            yield from real(*arguments)
    owner.blocks = run

from_now_on("{phase}")
endless({owner})
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a model and its shard set."""
    build(tmp_path / "model", Spec("fp8_block"))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "phase", "owner", "least"),
    [
        ("verify", "verify_digests", "Source", 50_000),  # no header
        ("verify", "compare_with_source", "Grid", 0),
        ("merge", "check_set_digests", "Source", 0),
    ],
)
def test_while_threads_are_at_work(made: Path, command: str, phase: str, owner: str, least: int) -> None:
    further = ("--source", made / "model") if command == "verify" else (made / "merged",)
    before = ENDLESS.format(phase=phase, owner=owner, least=least)
    at_once = threading.Event()
    at_once.set()
    arguments = (command, made / "shards", *further, "--quiet")
    done = interrupted(at_once, *arguments, line=True, before=before)
    assert done == Done(130, "", "again\ninterrupted\n")


def commands(model: str, shards: str, local: Path) -> dict[str, tuple[object, ...]]:
    """Each with a remote address; what is local is there."""
    return {
        "inspect": ("inspect", model),
        "check": ("check", model, "--tp", 2),
        "estimate": ("estimate", model, "--tp", 2),
        "verify": ("verify", shards, "--quiet"),
        "verify against": ("verify", local / "shards", "--source", model, "--quiet"),
    }


NAMES = tuple(commands("", "", Path()))


@pytest.fixture
def hubs(made: Path) -> Iterator[tuple[Hub, Hub]]:
    """Plain servers with the model and with the set."""
    with serving(Hub({COMMIT: made / "model"})) as model, serving(Hub({COMMIT: made / "shards"})) as shards:
        yield model, shards


@pytest.mark.parametrize(
    ("name", "part"), [*((name, "header") for name in NAMES), ("verify", "weight"), ("verify against", "weight")]
)
def test_while_a_server_is_silent(made: Path, hubs: tuple[Hub, Hub], name: str, part: str) -> None:
    """Its time-out is not waited for."""
    begun = threading.Event()

    def silent(handler: Handler, asked: Asked) -> bool:
        if not (asked.is_weights if part == "header" else asked.is_big):
            return False
        begun.set()
        return handler.hub.over.wait()

    for hub in hubs:
        hub.fault = silent
    model, shards = hubs
    done = interrupted(begun, *commands(model.page, shards.page, made)[name])
    assert done == Done(130, "", "interrupted\n")
