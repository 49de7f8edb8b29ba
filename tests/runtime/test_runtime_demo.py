"""`python -m reshard_runtime.demo` on whole shard sets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.running import split

TIMEOUT_SECONDS = 180
_NUMBER = r"[0-9.e+-]+"


def _demo(*arguments: object, torchrun: int | None = None) -> subprocess.CompletedProcess[str]:
    if torchrun is None:
        command = [sys.executable, "-m", "reshard_runtime.demo"]
    else:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(torchrun),
            "-m",
            "reshard_runtime.demo",
        ]
    whole = [*command, *(str(argument) for argument in arguments)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)


def _shards(tmp_path: Path, recipe: str, tp_size: int, **options: str) -> Path:
    build(tmp_path / "model", Spec(recipe, 256, 1024, computable=True))
    split(tmp_path / "model", tmp_path / "shards", Cut(tp_size, **options))
    return tmp_path / "shards"


# BF16 has 8 bits: a rounding is 2^-9 of a value at most, 3 of them one after another. int8 steps are max/127 wide, so
# off by step / sqrt(12): about 1 % of tokens whose largest of some hundred values is 3 to 4 times the typical one. The
# static step of these shards is 1/16, of typical values of 0.4: 5 %.
@pytest.mark.parametrize(
    ("recipe", "bound"), [("bf16", 0.006), ("ct_dynamic", 0.03), ("modelslim_static", 0.1), ("fp8_block", 0.006)]
)
def test_says_what_ranks_hold_and_how_far_they_are_off(tmp_path: Path, recipe: str, bound: float) -> None:
    shards = _shards(tmp_path, recipe, 2)
    done = _demo(shards, "--tokens", 5)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert re.search(
            rf"^rank {rank}: denseffn-rank-0000{rank}-of-00002.safetensors, [0-9.]+ MiB in 2 ", done.stdout, re.M
        )
    found = re.findall(
        rf"^layer (\d): 2 ranks, 5 tokens each: error ({_NUMBER}) split, ({_NUMBER}) unsplit", done.stdout, re.M
    )
    assert [index for index, _, _ in found] == ["0", "1"]
    for _, error, whole in found:
        assert 0 < float(error) < bound
        assert float(error) < 1.5 * float(whole)


def test_runs_under_torchrun(tmp_path: Path) -> None:
    done = _demo(_shards(tmp_path, "bf16", 2), torchrun=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nlayer ") == 2


def test_torchrun_with_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    done = _demo(_shards(tmp_path, "bf16", 2), torchrun=1)
    assert done.returncode != 0
    assert "is cut for 2 ranks, torchrun started 1 processes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "nowhere: no manifest.json"), (("{}", "--device", "tpu"), "--device is tpu; it may be cpu")],
)
def test_one_line_for_what_cannot_run(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    shards = _shards(tmp_path, "bf16", 1)
    done = _demo(*(argument.format(shards) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_activation_that_is_not_known_is_one_line_too(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("bf16", 256, 1024, config={"hidden_act": "situ"}))
    split(tmp_path / "model", tmp_path / "shards", Cut(2))
    done = _demo(tmp_path / "shards")
    assert done.returncode == 1
    assert f"error: {tmp_path}/shards: layer 0: its activation is situ, whose formula is not known here" in done.stderr
    assert done.stderr.count("\n") == 1
