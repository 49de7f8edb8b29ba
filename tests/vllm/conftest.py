"""These tests want vLLM's CPU build, which has an environment of its own: `make test-vllm`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.support.builders import CHECKPOINTS
from tests.support.distributed import Ranks, kept
from tests.support.running import split
from tests.vllm import environment
from tests.vllm.models import write_model

if not environment.INSTALLED:
    collect_ignore_glob = ["test_*.py"]
W8A8 = CHECKPOINTS / "llmcompressor-w8a8-all-dense"


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Importing vLLM takes each process 15 s, and many times that on a busy machine."""
    yield from kept(timeout=400)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dense layers, FP32; the sets `tp2` and `tp4` stand beside it."""
    return _with_sets(write_model(tmp_path_factory.mktemp("dense") / "model"), 2, 4)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dense layers and two with experts, FP32."""
    return _with_sets(write_model(tmp_path_factory.mktemp("mixed") / "model", layers=4, dense=2), 2)


@pytest.fixture(scope="session")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model that llm-compressor quantized."""
    folder = tmp_path_factory.mktemp("w8a8") / "model"
    folder.symlink_to(W8A8, target_is_directory=True)
    return _with_sets(folder, 2)


@pytest.fixture(scope="session")
def two(ranks: Callable[[int], Ranks]) -> Ranks:
    """Two data-parallel ranks."""
    return ranks(2)


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two tensor-parallel ranks: a process makes vLLM's groups once."""
    ranks = Ranks(2, timeout=400)
    yield ranks
    ranks.stop()


def _with_sets(model: Path, *sizes: int) -> Path:
    for size in sizes:
        split(model, model.parent / f"tp{size}", Cut(size))
    return model
