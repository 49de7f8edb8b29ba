"""ModelSlim's description: every tensor's name, and what it is quantized as."""

from collections.abc import Callable, Mapping
from typing import Any

from reshard.errors import SourceError
from reshard.quantization.names import names_of
from reshard.schemes.match import QuantSpec

DESCRIPTION = "quant_model_description.json"
"""What vllm-ascend reads; older tools add a scheme to the name."""


def is_description(name: str) -> bool:
    """Whether a file is ModelSlim's account of each tensor's type."""
    return name.startswith(DESCRIPTION.removesuffix(".json")) and name.endswith(".json")


def read_description(file: str, types: Mapping[str, Any]) -> Callable[[str], QuantSpec | None]:
    """A function that tells what the description says of a module; None: nothing.

    That is the type of its weight, which is all that vllm-ascend looks up. The function raises SourceError where the
    module's tensors are given different types.
    """
    by_module: dict[str, dict[str, Any]] = {}
    for key, kind in types.items():
        module, _, suffix = key.rpartition(".")
        if suffix != "bias":  # FLOAT beside a quantized weight
            by_module.setdefault(module, {})[suffix] = kind

    def declare(module: str) -> QuantSpec | None:
        given = next((by_module[name] for name in names_of(module) if "weight" in by_module.get(name, {})), None)
        if given is None:
            return None
        for suffix, kind in given.items():
            if not isinstance(kind, str):
                raise SourceError(
                    f"{module}.{suffix}: {file} says {kind!r}, expected the name of a type; is the file of this "
                    "checkpoint?"
                )
        if len(set(given.values())) > 1:
            first_of = {kind: suffix for suffix, kind in sorted(given.items(), reverse=True)}
            both = ", ".join(f"{suffix} {kind}" for kind, suffix in first_of.items())
            raise SourceError(
                f"{module}: {file} gives its tensors different types: {both}; is the file of this checkpoint?"
            )
        return QuantSpec(given["weight"], None, f"{file} ({given['weight']})")

    return declare
