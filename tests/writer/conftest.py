"""A source, and the set of four that one process makes of it; nobody changes them."""

from pathlib import Path

import pytest

from tests.support.builders import Spec, build
from tests.support.sets import Files, no_fsync, snapshot, split  # noqa: F401

SPEC = Spec("modelslim_v0_static", dense=1)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer") / "source"
    build(folder, SPEC)
    return folder


@pytest.fixture(scope="session")
def wanted(source: Path) -> Files:
    split(source, source.parent / "wanted")
    return snapshot(source.parent / "wanted")


@pytest.fixture
def finished(tmp_path: Path, wanted: Files) -> Path:
    """A copy of the finished set, in a folder `out`."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of the same name and shapes, and of other values."""
    folder = tmp_path_factory.mktemp("other") / "source"
    build(folder, Spec(**{**vars(SPEC), "seed": 5}))
    return folder
