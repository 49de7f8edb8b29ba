"""Paths that cannot be reached: below a folder that may not be searched, or of names that no file can have."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.paths import CONFIGS
from tests.support.running import reshard, split

_NOBODY = 65534
CONFIG = CONFIGS / "deepseek-r1.json"

COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "split": lambda there, place: ("split", place, there / "out", "--tp", 2),
    "inspect": lambda there, place: ("inspect", place),
    "check": lambda there, place: ("check", place, "--tp", 2),
    "check --config": lambda there, place: ("check", "--config", f"{place}.json", "--tp", 2),
    "check --against": lambda there, place: ("check", there / "cut", "--against", place),
    "estimate": lambda there, place: ("estimate", place, "--tp", 2),
    "estimate --device": lambda there, place: ("estimate", "--config", CONFIG, "--tp", 2, "--device", f"{place}.toml"),
    "verify": lambda there, place: ("verify", place),
    "verify --source": lambda there, place: ("verify", there / "cut", "--source", place, "--quiet"),
    "merge": lambda there, place: ("merge", place, there / "out"),
    "split OUT": lambda there, place: ("split", there / "model", place, "--tp", 2),
    "merge OUT": lambda there, place: ("merge", there / "cut", place),
    "synth OUT": lambda there, place: ("synth", CONFIG, place, "--scale", "1/32", "--layers", 1),
}


@pytest.fixture(scope="module")
def there() -> Iterator[Path]:
    """Where also another user may read and write."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build(folder / "model", Spec())
        split(folder / "model", folder / "cut", Cut(2))
        (folder / "locked").mkdir(mode=0)
        for path in (folder, folder / "model", folder / "cut"):
            path.chmod(0o777)
        yield folder


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Whom a folder's mode keeps out, as it does not keep out root."""
    before = os.geteuid(), os.getegid()
    if before[0] == 0:
        os.setegid(_NOBODY)
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_below_a_folder_that_may_not_be_searched(command: str, there: Path, tmp_path: Path) -> None:
    reshard(*COMMANDS[command](there, tmp_path / "place"))  # imports what the other user may not read
    line = COMMANDS[command](there, there / "locked" / "place")
    with another_user():
        done = reshard(*line)
    assert done.code == 1, done
    assert f"{there}/locked/place" in done.err
    assert "Permission denied" in done.err
    assert len(done.err.splitlines()) == 1
    assert "see to it" not in done.err  # what is said of errors that nobody expected
    assert not (there / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_file_can_have(command: str, there: Path) -> None:
    done = reshard(*COMMANDS[command](there, there / ("x" * 300)))
    assert done.code == 1, done
    assert "File name too long" in done.err
    assert len(done.err.splitlines()) == 1
    assert "see to it" not in done.err  # what is said of errors that nobody expected
    assert not (there / "out").exists()


def test_what_may_not_be_searched_is_no_hub_s_name(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`locked/place` is a repository's name too: nothing is asked of the hub."""
    monkeypatch.chdir(there)
    with another_user():
        done = reshard("inspect", "locked/place")
    assert (done.code, done.err) == (
        1,
        "error: locked/place: cannot be read: Permission denied; check its owner, permissions and disk\n",
    )


def test_other_targets_of_check_are_checked_all_the_same(there: Path) -> None:
    with another_user():
        done = reshard("check", there / "locked" / "place", there / "model", "--tp", 2)
    assert done.code == 1
    assert f"{there}/model" in done.out


@pytest.mark.parametrize("byte", [b"\xff", b"\\"])
@pytest.mark.parametrize("file", ["*.safetensors", "*description*.json"])
def test_names_that_no_manifest_can_hold(file: str, byte: bytes, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_dynamic", files=1, index=False))
    (path,) = (tmp_path / "model").glob(file)
    path.rename(path.with_name(path.stem + os.fsdecode(byte) + path.suffix))
    for line in (("split", tmp_path / "model", tmp_path / "out", "--tp", 2), ("check", tmp_path / "model")):
        done = reshard(*line)
        assert done.code == 1, done
        assert "no manifest can hold this name" in done.err
        assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
