"""Memory of `reshard split` into S3: DeepSeek-R1's three dense layers (BF16, 2.38 GB, tp 8), by number of workers.

The server is moto's, on this machine, and slow: its time says nothing.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.measure import run, tool
from tests.support.s3 import Server


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    workers = parser.parse_args().workers
    config = Path(__file__).parent.parent / "configs" / "deepseek-r1.json"
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as work:
        source = Path(work) / "source"
        run([tool("reshard"), "synth", config, source, "--dense-only", "--scheme", "bf16", "--quiet"])
        for number in workers:
            server = Server()
            os.environ.update(server.environment)
            try:
                out = f"s3://{server.bucket}/r1-tp8"
                done = run([tool("reshard"), "split", source, out, "--tp", "8", "--quiet", "--workers", str(number)])
            finally:
                server.stop()
            print(f"{number} workers: {done.anonymous_bytes / 1e6:.0f} MB of anonymous memory, {done.seconds:.0f} s")


if __name__ == "__main__":
    main()
