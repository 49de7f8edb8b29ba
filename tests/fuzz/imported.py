"""What the server that forks the workers imports once."""

import reshard.api
import reshard.cli.main
import reshard.source.hub
import reshard_runtime
import tests.fuzz.worker  # noqa: F401

__all__ = ["reshard", "reshard_runtime"]
