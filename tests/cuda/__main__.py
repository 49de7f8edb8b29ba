"""`make test-cuda`: the CUDA backend on a machine that has such a device. No network; nothing is left behind.

    python -m tests.cuda [--device cuda|cpu] [--size r1|small] [--json FILE]

The device's kernels against the CPU backend's numbers, the ranks of one group one after another, CUDA graphs of the
whole forward, loading, a decode step against the memory's bandwidth. Skipped in one line where there is no device;
exit code 3 where a check fails. With `--device cpu` all but graphs and nccl, to try the script itself.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NEEDED = ("torch", "numpy", "safetensors", "blake3", "pydantic", "ml_dtypes")
_FAILED = 3


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("r1", "small"), default="r1")
    parser.add_argument("--json", type=Path, help="also write everything into this file")
    arguments = parser.parse_args(argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"tests.cuda: {sys.executable} lacks {', '.join(missing)}; give PYTHON= one that has them", file=sys.stderr
        )
        return 1
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(f"tests.cuda: skipped: torch {torch.__version__} sees no CUDA device")
        return 0
    from tests.cuda.layers import R1, SMALL
    from tests.cuda.run import run

    start = time.perf_counter()
    report = run(arguments.device, {"r1": R1, "small": SMALL}[arguments.size])
    report.seconds = time.perf_counter() - start
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.document(), indent=2) + "\n")
    print("\n".join(report.lines()))
    return 0 if report.ok else _FAILED


if __name__ == "__main__":
    sys.exit(main())
