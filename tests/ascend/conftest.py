"""These tests want the real vllm-ascend, which has an environment of its own: `make test-ascend`."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.ascend import stand_ins
from tests.ascend.models import Model, made_of
from tests.support import forks
from tests.support.distributed import Ranks, kept
from tests.support.running import split
from tests.vllm.models import write_model

if importlib.util.find_spec("vllm_ascend") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # Inherited by every process that is started here.
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    forks.IMPORTED[:] = ["torch.distributed"]  # transformers only after stand_ins.put_in


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Groups of processes by size, started when they are first used and kept, whatever they serve.

    Importing vLLM and vllm-ascend takes each process 15 s, and many times that on a busy machine.
    """
    yield from kept(prepare=stand_ins.put_in, timeout=400)


@pytest.fixture(scope="session")
def two(ranks: Callable[[int], Ranks]) -> Ranks:
    """Two processes."""
    return ranks(2)


@pytest.fixture(scope="session")
def four(ranks: Callable[[int], Ranks]) -> Ranks:
    """Four processes."""
    return ranks(4)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dense layers, BF16; the sets `tp2` and `tp4` stand beside it."""
    return with_sets(write_model(tmp_path_factory.mktemp("dense") / "model", dtype="bfloat16"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers and two with experts, BF16, with the same sets."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    return with_sets(write_model(folder, layers=4, dense=2, dtype="bfloat16"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Each by its name, made once."""
    made: dict[str, Model] = {}

    def of(name: str) -> Model:
        if name not in made:
            made[name] = made_of(name, tmp_path_factory.mktemp("model"))
        return made[name]

    return of


def with_sets(model: Path) -> Path:
    """Cut for 2 and for 4."""
    for size in (2, 4):
        split(model, model.parent / f"tp{size}", Cut(size))
    return model
