"""The sdist holds what git tracks, whatever else lies in the checkout."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TrackedFiles(BuildHookInterface):
    """For the target sdist. Where it is built from an unpacked sdist, all that is there is taken."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it looks for files."""
        if not (Path(self.root) / ".git").exists():
            return
        listed = subprocess.run(["git", "-C", self.root, "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = listed.stdout.rstrip("\0").split("\0")
        self.build_config.target_config["only-include"] = [name for name in names if (Path(self.root) / name).is_file()]
