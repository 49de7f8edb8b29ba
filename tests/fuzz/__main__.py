"""`make fuzz SEED=3 COUNT=5000`, or `ONLY=17` for one case, whose folder is kept."""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import run


def tell(text: str) -> None:
    """On stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--only", type=int, help="one mutation, and what each command says of it")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    numbers = range(given.count) if given.only is None else [given.only]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        summary = run(given.seed, numbers, folder, given.workers, tell, kept=given.only is not None)
    finally:
        if given.only is None:
            shutil.rmtree(folder, ignore_errors=True)
    tell(str(summary) if given.only is None else f"{summary}\nkept in {folder}")
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
