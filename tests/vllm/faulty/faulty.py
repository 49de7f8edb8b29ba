"""A plugin for the tests, found where this folder is on PYTHONPATH: rank 1's layers fail once a file is there."""

import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    from reshard_runtime.serving.vllm.split_mlp import SplitMLP

    real = SplitMLP.run

    def run(self: Any, x: Any) -> Any:
        if self.group.rank == 1 and Path(os.environ["FAULTY"]).exists():
            raise RuntimeError("a fault that the test wants")
        return real(self, x)

    SplitMLP.run = run  # type: ignore[assignment, method-assign]
