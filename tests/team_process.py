"""The command line in one process of a team; in the process that FAULT names, something happens at a chosen step."""

import json
import os
from pathlib import Path

import reshard.writer.gloo
import reshard.writer.split
import reshard.writer.stream
from reshard.cli.main import main
from tests.faults import STAGE_BYTES, Steps

if __name__ == "__main__":
    fault = json.loads(os.environ["FAULT"])
    reshard.writer.stream.STAGE_BYTES = STAGE_BYTES
    reshard.writer.split._APPEARING_SECONDS = 1.0
    for name, value in fault.get("constants", {}).items():
        setattr(reshard.writer.gloo, name, value)
    if fault.get("process") == int(os.environ["RANK"]):
        Steps(Path(fault["out"]), fault["at"], fault["action"]).install()
    main()
