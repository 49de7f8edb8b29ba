"""The environments that are made package by package hold all that the project requires."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

LOCKS = sorted((ROOT / "tests/ascend/requirements").glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_the_lock_of_vllm_ascend_has_what_the_project_requires(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["dependencies"])
    assert [
        str(each) for each in wanted if not each.specifier.contains(pinned.get(canonicalize_name(each.name), "0"))
    ] == []


def test_there_are_locks() -> None:
    assert [lock.stem for lock in LOCKS] == ["0.18.0", "0.23.0.post1"]
