"""What the distributions hold."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def _tracked(folder: Path) -> list[str]:
    listed = subprocess.run(["git", "-C", folder, "ls-files", "-z"], capture_output=True, text=True, check=True)
    return listed.stdout.rstrip("\0").split("\0")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone: nothing says what is tracked")
def test_an_sdist_holds_tracked_files_only(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    clone, tracked = tmp_path / "clone", [name for name in _tracked(ROOT) if (ROOT / name).is_file()]
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
    subprocess.run(["git", "init", "--quiet", clone], check=True)
    subprocess.run(["git", "-C", clone, "add", "--force", "--all"], check=True)
    for name in ("notes.txt", "reshard/notes.py", "tests/data/.token", "private/notes.txt"):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text("mine")
    build = "import hatchling.build, sys; print(hatchling.build.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names == {*tracked, "PKG-INFO"}
