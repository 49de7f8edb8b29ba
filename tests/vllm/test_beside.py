"""The built wheel beside this vLLM: nothing of the engine's moves, and the engine finds the plugin in it."""

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support import beside


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    return beside.install(wheel, wheel.parent / "site")


def test_installing_it_moves_nothing(wheel: Path) -> None:
    assert beside.would_install(wheel) == {"reshard"}


def test_everyone_has_what_they_want(site: Path) -> None:
    assert beside.unmet(site) == []


def test_the_engine_finds_the_plugin(site: Path) -> None:
    assert beside.registered(site) == (True, "DenseFFNShardsLoader")


def test_the_engines_client_reads_from_the_hub() -> None:
    assert "HF_HUB_OFFLINE forbids to ask" in beside.from_the_hub()


def test_a_requirement_of_another_version_would_be_found(site: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(site, tmp_path / "site"))
    (metadata,) = other.glob("reshard-*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace("Requires-Dist: numpy>=1.26", "Requires-Dist: numpy<1.26"))
    (said,) = beside.unmet(other)
    assert said == f"reshard {version('reshard')} wants numpy<1.26, here is {version('numpy')}"
    assert beside.unmet(other, leaving_out={"numpy"}) == []
