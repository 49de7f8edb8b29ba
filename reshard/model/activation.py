"""What stands between a dense layer's matrices: act(gate) * up, with a limit on both where a model has one.

It is read from config.json (reshard.model.config), recorded in the manifest for each layer, computed by the runtime and
by verify. A name that no formula here is known for is kept as the config has it: such a layer can be cut, and what
computes refuses it by that name.
"""

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"
FORMULAS = {
    SILU: "x * sigmoid(x)",
    GELU: "x * (1 + erf(x / sqrt(2))) / 2",
    GELU_TANH: "x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2",
}
"""The functions that are computed. gelu_tanh is transformers' gelu_pytorch_tanh."""

_WRITE = 'write the model\'s hidden_act ("silu", …)'


@dataclass(frozen=True)
class Activation:
    """`limit` L: act(min(gate, L)) * clamp(up, -L, L), as transformers' models with a `swiglu_limit` compute it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}  # of the manifest's entry

    name: str
    limit: float | None = None

    def __post_init__(self) -> None:
        if not self.name or not (self.limit is None or 0 < self.limit < inf):
            raise ValueError(f"no activation: name {self.name!r}, limit {self.limit}")

    @property
    def is_known(self) -> bool:
        """Whether its formula is."""
        return self.name in FORMULAS

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name} with limit {self.limit:g}"


def not_computed(activation: Activation | None, *, config: bool | None = None) -> str | None:
    """Why a layer is not computed, and what to do; None where its activation is known.

    config: whether there is a config.json, where that can be told.
    """
    if activation is None:
        why = {
            True: f"config.json names none; {_WRITE} there",
            False: "there is no config.json; put the model's beside the weights",
            None: f"no config.json stood beside the weights, or it names none; put it there, or {_WRITE} in it",
        }[config]
        return f"its activation is not known: {why}, and cut them again"
    if activation.is_known:
        return None
    return (
        f"its activation is {activation}, whose formula is not known here ({', '.join(FORMULAS)} are, each with or "
        "without a limit); the shards are right, and code that has the formula can run them: load_shard gives their "
        "tensors"
    )
