"""Running the command line, in this process or in one of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from reshard.cli.main import app
from reshard.manifest import parse_manifest
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from reshard.writer.split import SplitOptions, SplitResult, write_shards
from tests.support.paths import ROOT

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Stdout as JSON."""
        return json.loads(self.out)


def reshard(*arguments: object) -> Done:
    """The command line in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def reshard_process(*arguments: object, before: str = "", **environment: str) -> Done:
    """The command line in a process of its own; `before` is Python that runs first in it."""
    code = f"{before}\nfrom reshard.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def interrupted(
    once: threading.Event,
    *arguments: object,
    by: signal.Signals = signal.SIGINT,
    line: bool = False,
    environment: Mapping[str, str] | None = None,
    before: str = "",
) -> Done:
    """The command line in a process of its own, which gets a Ctrl-C, or another signal, once the event is set.

    line: and a line was said on stderr. before: Python that runs first in it.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom reshard.cli.main import main\nmain()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert once.wait(TIMEOUT_SECONDS), f"it has not come so far within {TIMEOUT_SECONDS} s"
        assert process.stderr is not None
        said = process.stderr.readline() if line else ""
        process.send_signal(by)
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    return Done(process.returncode, out, said + err)


def signalled(arguments: Sequence[str], number: signal.Signals, seen: Callable[[], bool], **environment: str) -> int:
    """The exit status of a process that gets a signal when something is seen; it may end before that."""
    deadline, quiet = time.monotonic() + TIMEOUT_SECONDS, subprocess.DEVNULL
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=quiet, stderr=quiet, env={**os.environ, **environment}
    ) as process:
        try:
            while not seen():
                assert time.monotonic() < deadline, f"it has not come so far within {TIMEOUT_SECONDS} s"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(0.001)
            process.send_signal(number)
            return process.wait(TIMEOUT_SECONDS)
        finally:
            process.kill()


def split(source: Path, out: Path, cut: Cut, options: SplitOptions | None = None) -> SplitResult:
    """What the split command does, without the command line."""
    with open_source(str(source)) as opened:
        return write_shards(prepare(opened, cut), out, options or SplitOptions())


def split_parts(source: Path, out: Path, **sizes: int) -> Path:
    """What `split --part KEY=SIZE …` does: the folder, with a set of each part within if there are several."""
    parts = [word for key, size in sizes.items() for word in ("--part", f"{key}={size}")]
    done = reshard("split", source, out, *parts, "--quiet")
    assert done.code == 0, done.err
    return out


def same_but_for_the_origin(origin: dict[str, str], out: Path, right: Path) -> None:
    """That two sets are the same bytes, and that the manifest of `out` has `origin` in the place of the other's."""
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in right.iterdir())
    for path in right.iterdir():
        got, wanted = (out / path.name).read_bytes(), path.read_bytes()
        if path.name == "manifest.json":
            ours, theirs = json.loads(got), json.loads(wanted)
            assert {key: ours["source"].pop(key) for key in origin} == origin
            for key in origin:
                del theirs["source"][key]
            for raw, document in ((got, ours), (wanted, theirs)):
                parse_manifest(raw)  # its own digest is right, and of the origin, too
                del document["blake3"]
            assert ours == theirs
        else:
            assert got == wanted, path.name
