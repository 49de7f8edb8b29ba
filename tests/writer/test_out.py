"""What stands in OUT, or in its place, and is no file: refused before anything is written, and never followed."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from reshard.errors import OutputError
from reshard.plan.pipeline import Cut
from reshard.writer.lock import WriteLease
from tests.support import running
from tests.support.builders import Spec, build
from tests.support.not_files import KINDS, ends
from tests.support.paths import CONFIGS
from tests.support.running import reshard
from tests.support.sets import Files, record, shard, snapshot, split

__all__ = ["ends"]

LINKS: dict[str, Callable[[Path], None]] = {
    "to another file": lambda path: path.symlink_to("../outside"),
    "to nothing": lambda path: path.symlink_to("../not there"),
}
THERE = {**{kind: make for kind, make in KINDS.items() if kind != "a device"}, **LINKS}
NAMES = (
    "manifest.json",
    ".manifest.json.replaced",
    "config.json",
    shard(1),
    record(1),
    f".{shard(1)}.0123456789abcdef.tmp",
    ".reshard.lock",
    ".reshard-set.lock",
    ".reshard-rank-00001.lock",
)


def listing(folder: Path) -> dict[str, os.stat_result]:
    return {name: os.lstat(folder / name) for name in sorted(os.listdir(folder))}


def planted(folder: Path, name: str, kind: str) -> str:
    """Put it there. Returns what messages say."""
    folder.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder.parent / "outside").write_bytes(b"another's")
    THERE[kind](folder / name)
    return f"out: holds {name}, which is {kind if kind in KINDS else 'a link'}, expected a file; choose an empty folder"


@pytest.mark.parametrize("kind", THERE)
@pytest.mark.parametrize("name", NAMES)
def test_in_a_set_that_is_written_again(tmp_path: Path, source: Path, name: str, kind: str) -> None:
    out = tmp_path / "out"
    split(source, out)
    said = planted(out, name, kind)
    before = listing(out)
    for options in ({}, {"resume": True}, {"overwrite": True}, {"overwrite": True, "ranks": (1,)}):
        with pytest.raises(OutputError) as caught:
            split(source, out, **options)
        assert said in str(caught.value)
        assert listing(out) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]
    assert (tmp_path / "outside").read_bytes() == b"another's"


@pytest.mark.parametrize("kind", THERE)
@pytest.mark.parametrize("command", ["split", "merge", "synth"])
def test_in_a_folder_that_is_new(tmp_path: Path, source: Path, command: str, kind: str) -> None:
    said = planted(tmp_path / "out", ".reshard.lock", kind)
    split(source, tmp_path / "cut")
    line = {
        "split": ("split", source, tmp_path / "out", "--tp", 2),
        "merge": ("merge", tmp_path / "cut", tmp_path / "out"),
        "synth": ("synth", CONFIGS / "deepseek-r1.json", tmp_path / "out", "--scale", "1/32", "--layers", 1),
    }[command]
    done = reshard(*line)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert sorted(os.listdir(tmp_path)) == ["cut", "out", "outside"]
    assert os.listdir(tmp_path / "out") == [".reshard.lock"]


@pytest.mark.parametrize("kind", ["to another file", "to nothing", "a folder", "a socket"])
@pytest.mark.parametrize("name", [".reshard.lock", ".reshard-set.lock", ".reshard-rank-00001.lock"])
def test_a_lock_that_is_planted_after_a_look(tmp_path: Path, name: str, kind: str) -> None:
    planted(tmp_path / "out", name, kind)
    for ranks in (None, (1,)):
        with pytest.raises(OSError, match=r"Too many levels of symbolic links|Is a directory|No such device"):
            WriteLease(tmp_path / "out").acquire(ranks)
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.touch, "Not a directory"),
        (os.mkfifo, "Not a directory"),
        (lambda path: path.symlink_to("gone"), "is a link to gone ("),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
    ids=["file", "FIFO", "broken link", "loop"],
)
def test_in_its_place(tmp_path: Path, source: Path, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path / "out")
    split(source, tmp_path / "cut")
    for command in (("split", source, tmp_path / "out", "--tp", 2), ("merge", tmp_path / "cut", tmp_path / "out")):
        done = reshard(*command)
        assert (done.code, done.out) == (1, "")
        assert said in done.err
        assert len(done.err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["cut", "out"]
    assert not stat.S_ISDIR(os.lstat(tmp_path / "out").st_mode)


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path, source: Path, wanted: Files) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    split(source, tmp_path / "out")
    assert snapshot(tmp_path / "disk") == wanted


@pytest.mark.parametrize("size", [234, 250])
def test_a_name_that_is_too_long_while_it_is_written(tmp_path: Path, size: int) -> None:
    """255 bytes are a name's limit, and 22 of them the ending of a temporary file's."""
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    (path,) = (tmp_path / "model").glob("*description*.json")
    name = path.stem.ljust(size - 5, "x") + ".json"
    path.rename(path.with_name(name))
    with pytest.raises(OutputError, match=rf"{name}: its name has {size + 22} bytes .* the file system takes 255"):
        running.split(tmp_path / "model", tmp_path / "out", Cut(2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("../else", target_is_directory=True), "lm_head is a link, expected a folder"),
        (os.mkfifo, "lm_head: Not a directory"),
        (lambda path: path.write_bytes(b"mine"), "lm_head: Not a directory"),
        (lambda path: shutil.copytree(path.parents[1] / "done" / "lm_head", path), "lm_head: holds a finished shard"),
    ],
    ids=["link", "FIFO", "file", "finished set"],
)
def test_of_several_parts_none_is_written_where_one_cannot_be(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    command = ("--tp", 2, "--part", "denseffn", "--part", "lm_head", "--quiet")
    config = CONFIGS / "deepseek-v2-lite.json"
    assert reshard("synth", config, tmp_path / "model", "--scale", "1/16", "--layers", 2, "--quiet").code == 0
    assert reshard("split", tmp_path / "model", tmp_path / "done", *command).code == 0
    for folder in ("out", "else"):
        (tmp_path / folder).mkdir()
    make(tmp_path / "out" / "lm_head")
    done = reshard("split", tmp_path / "model", tmp_path / "out", *command)
    assert (done.code, done.out) == (1, "")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert os.listdir(tmp_path / "out") == ["lm_head"]
    assert os.listdir(tmp_path / "else") == []
