"""`python -m reshard_runtime.demo` on whole shard sets."""

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from reshard.plan.pipeline import Cut
from reshard_runtime import demo
from tests.support.builders import Spec, build
from tests.support.distributed import Ranks
from tests.support.running import signalled, split

TIMEOUT_SECONDS = 180
_NUMBER = r"[0-9.e+-]+"


def _shards(tmp_path: Path, recipe: str, tp_size: int, config: dict[str, str] | None = None) -> Path:
    build(tmp_path / "model", Spec(recipe, 256, 1024, computable=True, config=config or {}))
    split(tmp_path / "model", tmp_path / "shards", Cut(tp_size))
    return tmp_path / "shards"


# BF16 has 8 bits: a rounding is 2^-9 of a value at most, 3 of them one after another. int8 steps are max/127 wide, so
# off by step / sqrt(12): about 1 % of tokens whose largest of some hundred values is 3 to 4 times the typical one. The
# static step of these shards is 1/16, of typical values of 0.4: 5 %.
@pytest.mark.parametrize(
    ("recipe", "bound"), [("bf16", 0.006), ("ct_dynamic", 0.03), ("modelslim_static", 0.1), ("fp8_block", 0.006)]
)
def test_says_what_ranks_hold_and_how_far_they_are_off(
    ranks: Callable[[int], Ranks], tmp_path: Path, recipe: str, bound: float
) -> None:
    first, others = ranks(2).run(demo.compared, tmp_path, _shards(tmp_path, recipe, 2), 5, torch.device("cpu"))
    assert others == []
    for rank in range(2):
        assert re.match(rf"rank {rank}: denseffn-rank-0000{rank}-of-00002.safetensors, [0-9.]+ MiB in 2 ", first[rank])
    line = rf"layer (\d): 2 ranks, 5 tokens each: error ({_NUMBER}) split, ({_NUMBER}) unsplit, ({_NUMBER}) between"
    found = [match.groups() for said in first if (match := re.match(line, said))]
    assert [index for index, *_ in found] == ["0", "1"]
    for _, error, alone, between in found:
        assert 0 < float(error) < bound
        assert float(error) < 1.5 * float(alone)
        assert float(between) <= float(error) + float(alone)


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
def test_as_a_command(tmp_path: Path, torchrun: bool) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launcher, "-m", "reshard_runtime.demo", str(_shards(tmp_path, "bf16", 2))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nlayer ") == 2


@pytest.mark.slow
def test_a_rank_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    """And the others, whom it was told."""
    shards = _shards(tmp_path, "bf16", 2)
    os.truncate(shards / "denseffn-rank-00001-of-00002.safetensors", 100)
    done = subprocess.run(
        [sys.executable, "-m", "reshard_runtime.demo", str(shards)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    wrong = rf"{shards}/denseffn-rank-00001-of-00002.safetensors: 100 bytes, manifest.json says \d+"
    own = [line for line in lines if re.match(rf"error: process 1 of 2 \(.*\): {wrong}", line)]
    others = [line for line in lines if re.match(rf"error: process 0 of 2 \(.*\): rank 1 of the group .*{wrong}", line)]
    assert len(own) == 1
    assert lines == [*own, *others] or lines == [*others, *own]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "moment"), [("demo", "tp1"), ("measure", "meet")])
def test_told_to_end_it_leaves_no_temporary_folder(tmp_path: Path, program: str, moment: str) -> None:
    """While its ranks are at work."""
    place = tmp_path / "temporary"
    place.mkdir()
    arguments = [str(_shards(tmp_path, "bf16", 2))] if program == "demo" else ["2", "1"]
    command = [sys.executable, "-m", f"reshard_runtime.{program}", *arguments]
    for _ in range(5):  # a busy machine may let it end before
        code = signalled(command, signal.SIGTERM, lambda: any(place.glob(f"*/{moment}")), TMPDIR=str(place))
        if code != 0:
            break
    assert code == 143
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("program", ["demo", "measure"])
def test_what_nobody_foresaw_is_a_line(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    def refuse(*_: object) -> NoReturn:
        raise KeyError("first\x1b\nsecond")

    module = importlib.import_module(f"reshard_runtime.{program}")
    monkeypatch.setattr(module, "read_manifest" if program == "demo" else "spawn", refuse)
    done = _run(module.main, ["nowhere"] if program == "demo" else ["2", "1"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(r"error: unforeseen: KeyError: '?first.*second'?; run again with --debug, .*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no manifest.json"),
        (["{}", "--device", "tpu"], "--device is tpu; it may be cpu"),
        (["{}"], "{} is cut for 2 ranks, torchrun started 1 processes"),
    ],
)
def test_one_line_for_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    shards = _shards(tmp_path, "bf16", 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    _refused([argument.format(shards) for argument in arguments], message.format(shards))


def test_an_activation_that_is_not_known_is_one_line_too(tmp_path: Path) -> None:
    shards = _shards(tmp_path, "bf16", 2, {"hidden_act": "situ"})
    _refused([str(shards)], f"{shards}: layer 0: its activation is situ, whose formula is not known here")


def _refused(arguments: list[str], message: str) -> None:
    done = _run(demo.main, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def _run(main: Callable[..., None], arguments: list[str]) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)
