"""What stands in a file's place and is none: told in one line by whatever reads it, at once and in little memory."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.errors import ReshardError
from reshard.model.naming import shard_file
from reshard.plan.pipeline import Cut
from reshard_runtime import load_shard
from tests.support.builders import Spec, build
from tests.support.not_files import KINDS, ends
from tests.support.paths import CONFIGS
from tests.support.running import reshard, split

SHARD = shard_file(1, 2)
EACH = ("a FIFO", "a device")  # of all kinds the two that might be read on and on

__all__ = ["ends"]

OF_A_MODEL: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "split": lambda model, tmp: ("split", model, tmp / "out", "--tp", 2, "--quiet"),
    "inspect": lambda model, tmp: ("inspect", model),
    "check": lambda model, tmp: ("check", model, "--tp", 2),
    "estimate": lambda model, tmp: ("estimate", model, "--tp", 2),
    "verify --source": lambda model, tmp: ("verify", tmp / "cut", "--source", model, "--quiet"),
    "check --against": lambda model, tmp: ("check", tmp / "cut", "--against", model),
}
OF_A_SET: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "verify": lambda cut, tmp: ("verify", cut, "--quiet"),
    "merge": lambda cut, tmp: ("merge", cut, tmp / "out", "--quiet"),
    "inspect": lambda cut, tmp: ("inspect", cut),
    "check": lambda cut, tmp: ("check", cut),
    "split": lambda cut, tmp: ("split", cut, tmp / "out", "--tp", 1, "--quiet"),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a description, and a set that was cut from it."""
    folder = tmp_path_factory.mktemp("right")
    build(folder / "model", Spec("modelslim_dynamic"))
    split(folder / "model", folder / "cut", Cut(2))
    return folder


@pytest.fixture
def tmp(right: Path, tmp_path: Path) -> Path:
    """Links to what is right, each of which a test may replace."""
    for folder in ("model", "cut"):
        (tmp_path / folder).mkdir()
        for path in (right / folder).iterdir():
            (tmp_path / folder / path.name).symlink_to(path)
    return tmp_path


def instead(path: Path, kind: str) -> None:
    path.unlink()
    KINDS[kind](path)


def refused(kind: str, name: str, *command: object) -> None:
    done = reshard(*command)
    assert done.code in (1, 3)
    assert re.search(rf"{name}\b.* is {kind}, expected a file", done.err + done.out), done
    assert len(done.err.splitlines()) <= 1
    assert "unforeseen" not in done.err


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("command", OF_A_MODEL)
@pytest.mark.parametrize(
    "file", ["config.json", "quant_model_weights.safetensors.index.json", "quant_model_description.json", "weights"]
)
def test_in_a_checkpoint(kind: str, command: str, file: str, tmp: Path) -> None:
    (name,) = {path.name for path in (tmp / "model").glob("*00001-of-*.safetensors")} if file == "weights" else {file}
    instead(tmp / "model" / name, kind)
    refused(kind, name, *OF_A_MODEL[command](tmp / "model", tmp))
    assert not (tmp / "out").exists()


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("command", OF_A_SET)
@pytest.mark.parametrize("file", ["manifest.json", "config.json", SHARD])
def test_in_a_set(kind: str, command: str, file: str, tmp: Path) -> None:
    instead(tmp / "cut" / file, kind)
    refused(kind, file, *OF_A_SET[command](tmp / "cut", tmp))
    assert not (tmp / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", SHARD])
def test_to_the_loader(kind: str, file: str, tmp: Path) -> None:
    instead(tmp / "cut" / file, kind)
    with pytest.raises(ReshardError, match=f"{file} is {kind}, expected a file"):
        load_shard(tmp / "cut", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_named_on_the_command_line(kind: str, tmp_path: Path) -> None:
    for name, command in {
        "x.json": ("check", "--config", tmp_path / "x.json", "--tp", 2),
        "y.json": ("estimate", "--config", tmp_path / "y.json", "--tp", 2),
        "z.json": ("synth", tmp_path / "z.json", tmp_path / "out"),
        "x.toml": ("estimate", "--config", CONFIGS / "deepseek-r1.json", "--tp", 2, "--device", tmp_path / "x.toml"),
    }.items():
        KINDS[kind](tmp_path / name)
        refused(kind, name, *command)


@pytest.mark.parametrize("name", ["x.json", "x.toml"])
def test_a_file_without_end(name: str, tmp_path: Path) -> None:
    """A hole of 1 TiB: it is not read whole."""
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 1 << 40)
    config = tmp_path / name if name == "x.json" else CONFIGS / "deepseek-r1.json"
    done = reshard(
        "estimate",
        "--config",
        config,
        "--tp",
        2,
        *(("--device", tmp_path / name) if config.is_relative_to(CONFIGS) else ()),
    )
    assert done.code == 1
    assert f"{name} has 1,099,511,627,776 bytes, expected at most " in done.err
