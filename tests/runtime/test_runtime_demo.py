"""`python -m reshard_runtime.demo` on whole shard sets."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from reshard.plan.pipeline import Cut
from reshard_runtime import demo
from tests.support.builders import Spec, build
from tests.support.distributed import Ranks
from tests.support.running import split

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
    first, others = ranks(2).run(demo.run, _shards(tmp_path, recipe, 2), 5, torch.device("cpu"))
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
    app = typer.Typer()
    app.command()(demo.main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
