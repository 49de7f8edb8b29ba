"""What a check found wrong."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A difference: which check found it, in which file or tensor, and both sides in one line."""

    check: str
    where: str
    message: str
