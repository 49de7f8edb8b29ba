"""What a check found."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "skipped", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Which check found what, where (a file, a tensor, a group size; empty for all of it), in one line.

    An error names both sides. `skipped`: what could not be checked, and why.
    """

    check: str
    where: str
    message: str
    severity: Severity = "error"

    @property
    def line(self) -> str:
        """Where, and what."""
        return f"{self.where}: {self.message}" if self.where else self.message
