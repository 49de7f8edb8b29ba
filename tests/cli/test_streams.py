"""Standard streams that are closed, full, or read no further: what is done is done, and what fails says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.running import TIMEOUT_SECONDS, Done, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a shard set."""
    place: Path = tmp_path_factory.mktemp("streams")
    build(place / "model", Spec())
    split(place / "model", place / "set", Cut(2))
    return place


def run(streams: str, *arguments: object) -> Done:
    """A command with its streams as a shell redirects them; those that are not named are read."""
    script = f'exec "$@" {streams}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "reshard", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&- 2>/dev/full"])
def test_a_complete_set_is_a_success(folder: Path, tmp_path: Path, streams: str) -> None:
    """And no descriptor of a shard is one that lines for people go to."""
    out = tmp_path / "out"
    done = run(streams, "split", folder / "model", out, "--tp", 2)
    assert done.code == 0, done.err
    for path in (folder / "set").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("streams", "arguments", "code"),
    [
        ("2>&-", ("inspect", "none"), 1),
        ("2>/dev/full", ("inspect", "none"), 1),
        ("2>&-", ("verify", "set"), 0),
        (">&-", ("inspect", "model"), 0),
        ("2>&-", ("split", "--nonsense"), 2),
        (">&-", ("--help",), 0),
    ],
)
def test_errors_are_never_data(folder: Path, streams: str, arguments: tuple[str, ...], code: int) -> None:
    command, *rest = arguments
    done = run(streams, command, *(folder / one if one.isalpha() else one for one in rest))
    assert done.code == code
    assert done.err == ""
    assert (done.out == "") == (code != 0 or streams == ">&-")


def test_help_that_cannot_be_written(folder: Path) -> None:
    done = run(">/dev/full", "--help")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[0].startswith("error: OSError: No space left on device")


@pytest.mark.parametrize(("command", "code"), [("inspect", 0), ("check", 3)])
def test_a_reader_that_has_gone(folder: Path, command: str, code: int) -> None:
    """`| head`: the command's own exit code, and not a word."""
    arguments = [folder / "model", *(("--tp", "7") if command == "check" else ())]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "reshard", command, *map(str, arguments)],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


def test_what_libraries_print_is_made_safe(folder: Path) -> None:
    """Logs, warnings and exceptions of threads go to stderr without asking anybody."""
    says = r"x\x1b]0;\n::error::y s3://key:S3CR3T@bucket"
    before = f"""
import logging, sys, threading, warnings
import reshard.cli.main as program
app = program.app
def noisy():
    logging.getLogger("x").warning("{says}")
    warnings.warn("{says}")
    sys.stderr.write("{says}")
    sys.stderr.flush()
    sys.stderr.write("\\n")
    def fail():
        raise ValueError("{says}")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
program.app = noisy
"""
    code = f"{before}\nfrom reshard.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
    )
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith(r"\x3a:error::y s3://bucket")]) == 4
    assert all(line.isprintable() and not line.startswith("::") for line in lines)
    assert "S3CR3T" not in done.stderr
