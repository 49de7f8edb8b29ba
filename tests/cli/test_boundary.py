"""Whatever a command raises ends in one line and an exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from reshard.cli.output import Output
from reshard.errors import ReshardError
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.paths import CONFIGS
from tests.support.running import Done, reshard, reshard_process, split

OPTIONS = {
    "split": ("model", "out", "--tp", 2),
    "inspect": ("model",),
    "verify": ("set",),
    "merge": ("set", "out"),
    "check": ("model", "--tp", 2),
    "estimate": ("model", "--tp", 2),
    "synth": (CONFIGS / "deepseek-r1.json", "out", "--scale", "1/64", "--sparse"),
    "schema": (),
}
LINE = "unforeseen: ValueError: first line second; run again with --debug, and report what it shows"


def refuse(*_: object, **__: object) -> NoReturn:
    raise ValueError("first line\n  second")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """A command that fails where it shows its result, as nobody foresaw."""
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    monkeypatch.chdir(tmp_path)

    def fail(command: str, *options: str) -> Done:
        with monkeypatch.context() as patched:
            patched.setattr(Output, "escaped" if command == "schema" else "document", refuse)
            return reshard(command, *OPTIONS[command], *options)

    return fail


@pytest.mark.parametrize("command", OPTIONS)
def test_what_nobody_foresaw_is_a_line(run: Callable[..., Done], command: str) -> None:
    done = run(command)
    assert (done.code, done.err.splitlines()[-1]) == (1, f"error: {LINE}")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", OPTIONS)
def test_debug_shows_where(run: Callable[..., Done], command: str) -> None:
    done = run(command, "--debug")
    *trace, last = done.err.splitlines()
    assert (done.code, last) == (1, f"error: {LINE}")
    assert "Traceback (most recent call last):" in trace
    assert "ValueError: first line" in trace
    assert any("in refuse" in line for line in trace)


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (OSError(13, "Permission denied", "/a/b"), "HostError", "/a/b: Permission denied; see to it and start again"),
        (OSError(18, "Invalid link", b"/a\xff", None, "/b"), "HostError", r"/a\udcff -> /b: Invalid link; see to it"),
        (OSError(5, "Input/output error"), "HostError", "OSError: Input/output error; see to it and start again"),
        (MemoryError(), "HostError", "not enough memory (no more is given); free some, or use another host"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "UnforeseenError", "unforeseen: UnicodeEncodeErr"),
        (RecursionError("too deep"), "UnforeseenError", "unforeseen: RecursionError: too deep; run again with --debug"),
        (KeyError(), "UnforeseenError", "unforeseen: KeyError; run again with --debug"),
        (
            AssertionError("\x1b]0;\n::error::y"),
            "UnforeseenError",
            r"unforeseen: AssertionError: \x1b]0; ::error::y",
        ),
        (ReshardError("known"), "ReshardError", "known"),
        (type("Panic", (BaseException,), {})("of Rust"), "UnforeseenError", "unforeseen: Panic: of Rust; "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_exceptions(error: BaseException, kind: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("json", quiet=True, debug=False)
    with pytest.raises(Exception, match="1") as ended, output.errors():
        raise error
    assert getattr(ended.value, "exit_code", None) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}")
    assert len(said.err.splitlines()) == 1
    assert json.loads(said.out) == {"error": {"kind": kind, "message": said.err.removeprefix("error: ").strip()}}


def test_check_goes_on_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model", Spec())
    monkeypatch.setattr("reshard.checks.run.check_config", refuse)
    done = reshard("check", "--config", CONFIGS / "deepseek-r1.json", tmp_path / "model", "--tp", 2)
    assert done.code == 1
    assert done.err == f"error: {CONFIGS / 'deepseek-r1.json'}: {LINE}\n"
    assert f"{tmp_path / 'model'}: checkpoint" in done.out


def test_check_goes_on_where_a_name_is_too_long(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    done = reshard("check", f"{'x' * 5000}.json", tmp_path / "model", "--tp", 2)
    assert done.code == 1
    assert "File name too long" in done.err
    assert f"{tmp_path / 'model'}: checkpoint" in done.out


def test_typer_s_own_refusals_stay_and_are_safe() -> None:
    for arguments in (("split", "--a\x1bb"), ("s\x1b]0;x",), ("split", "a", "b", "--tp", "\x1b\n::error::x")):
        done = reshard_process(*arguments)
        assert (done.code, done.out) == (2, "")
        *_, last = done.err.splitlines()
        assert last.startswith("Error: ")
        assert all(line.isprintable() and not line.startswith("::") for line in done.err.splitlines())
