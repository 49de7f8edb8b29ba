"""The command line in one process of a team; in the process that FAULT names, something happens at a chosen step."""

import json
import os
from pathlib import Path

import reshard.cli.main
import reshard.writer.split
import reshard.writer.stream
import reshard.writer.team
from tests.support.faults import STAGE_BYTES, Steps


def main() -> None:
    """FAULT is JSON: process, out, at and action (see Steps), run (torchrun's count of restarts), constants."""
    fault = json.loads(os.environ.get("FAULT", "{}"))
    reshard.writer.stream.STAGE_BYTES = STAGE_BYTES
    reshard.writer.split._APPEARING_SECONDS = 1.0
    for name, value in fault.get("constants", {}).items():
        setattr(reshard.writer.team, name, value)
    run = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if fault.get("process") == int(os.environ["RANK"]) and fault.get("run", run) == run:
        Steps(Path(fault["out"]), fault["at"], fault["action"]).install()
    reshard.cli.main.main()


if __name__ == "__main__":
    main()
