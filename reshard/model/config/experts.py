"""The keys that count a model's experts."""

from collections.abc import Mapping
from typing import Any

from reshard.model.config.rules import EXPERT_COUNTS


def counting_keys(language: Mapping[str, Any]) -> list[str]:
    """The keys that count experts, as a language model's config has them: 0 and null too."""
    return [key for key in EXPERT_COUNTS if key in language]


def experts_key(language: Mapping[str, Any]) -> str | None:
    """The key that counts a language model's routed experts, None for a model without."""
    return next((key for key in EXPERT_COUNTS if experts(language.get(key))), None)


def experts(value: object) -> int:
    """How many experts a counting key gives: of a list the most, 0 where it counts none."""
    counts = value if isinstance(value, list) else [value]
    return max((count for count in counts if type(count) is int), default=0)
