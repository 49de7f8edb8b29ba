"""What a worker imports before its first case, with less patience for servers: only time is saved by it."""

import importlib

from huggingface_hub import constants

from reshard import limits

constants.HF_HUB_DOWNLOAD_TIMEOUT = limits.SILENCE_SECONDS = 0.5  # type: ignore[assignment]

for name in ("cli.main", "api", "source.hub", "source.open", "source.retry", "source.web", "writer.merge"):
    importlib.import_module(f"reshard.{name}")
for name in ("reshard_runtime", "rich.table", "tests.fuzz.worker", "tests.fuzz.answers"):
    importlib.import_module(name)
