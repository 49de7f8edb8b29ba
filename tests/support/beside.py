"""The built project beside an engine: what the tests in every engine's environment ask of it.

Such an environment holds most of what the project requires, in versions that the engine was made for. Installing the
project there may move none of them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from tests.support.running import reshard_process

TIMEOUT_SECONDS = 120
PROJECT, EXTRA = "reshard", "runtime"
_REGISTERED = """
import reshard_runtime
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor import model_loader
loader = model_loader._LOAD_FORMAT_TO_MODEL_LOADER["denseffn_shards"]
print(reshard_runtime.__file__, loader.__name__)
"""


def build_wheel(folder: Path) -> Path:
    """The wheel of the project as it stands; the environment has hatchling."""
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob(f"{PROJECT}-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The wheel's files alone, in a folder for PYTHONPATH."""
    _pip("install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def would_install(wheel: Path) -> set[str]:
    """What pip would install or move beside the engine; of what is not here, it has nothing."""
    out = _pip("install", "--dry-run", "--no-index", "--report", "-", f"{PROJECT}[{EXTRA}] @ {wheel.as_uri()}")
    return {canonicalize_name(each["metadata"]["name"]) for each in json.loads(out)["install"]}


def unmet(site: Path | None = None, leaving_out: Collection[str] = ()) -> list[str]:
    """Who wants another version than is here, of the packages that the project requires: it, or any other.

    `site`: where the project was installed by itself; None for the environment. `leaving_out`: packages whose versions
    the environment does not meet on purpose.
    """
    found = (*distributions(), *(distributions(path=[str(site)]) if site else ()))
    here = {str(canonicalize_name(each.name)): each for each in found}
    ours = {canonicalize_name(wanted.name) for wanted in _requirements(here[PROJECT])} - set(leaving_out)
    versions = {name: here[name].version if name in here else "none" for name in ours}
    return [
        f"{each.name} {each.version} wants {wanted}, here is {versions[name]}"
        for each in here.values()
        for wanted in _requirements(each)
        if (name := canonicalize_name(wanted.name)) in ours
        and (name not in here or not wanted.specifier.contains(versions[name], prereleases=True))
    ]


def registered(site: Path) -> tuple[bool, str]:
    """Whether the engine, started elsewhere, finds the plugin in `site`, and its loader's name."""
    done = subprocess.run(
        [sys.executable, "-c", _REGISTERED],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, loader = done.stdout.splitlines()[-1].split()
    return Path(file).is_relative_to(site), loader


def from_the_hub() -> str:
    """What is said of a repository on the Hub, which nobody asks: that it may not be, or that the client is too old."""
    return reshard_process("inspect", "some/model", HF_HUB_OFFLINE="1").err


def _requirements(distribution: Distribution) -> Iterator[Requirement]:
    """What it requires on this machine; of the project, what its serving part does."""
    extras = ("", EXTRA) if distribution.name == PROJECT else ("",)
    for text in distribution.requires or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            yield wanted


def _pip(*arguments: object) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
