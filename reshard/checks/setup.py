"""A serving setup, as the rules of its options see it, and what a rule says that it breaks."""

from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True)
class Setup:
    """A serving setup. `moe`: whether the model has MoE layers, None where it is not known.

    enforce_eager, decode_node (its kv_role consumes KV caches): None where the engine has judged them itself.
    """

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    moe: bool | None = None
    pipeline_parallel_size: int = 1
    enforce_eager: bool | None = None
    decode_node: bool | None = None

    @property
    def sizes(self) -> list[int]:
        """What denseffn_tensor_parallel_size may be. Without MoE layers no data-parallel ranks share anything."""
        chunks = [1] if self.moe is False else divisors(self.data_parallel_size)
        return [self.tensor_parallel_size * chunk for chunk in chunks]


@dataclass(frozen=True)
class Broken:
    """A rule that a setup breaks. warning: it may be meant, or not every version of the engine has the rule."""

    rule: str
    message: str
    warning: bool = False


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def either(values: list[int]) -> str:
    """`1, 2 or 4`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
