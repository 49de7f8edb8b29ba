"""act(gate) * up in float64, by its formula, and how far an error of gate or up is carried through it.

Shapes: I intermediate_size or a rank's share of it, T tokens.
"""

# ruff: noqa: N803, N806 - the suffixes are shapes

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reshard.model.activation import GELU, GELU_TANH, SILU, Activation

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Function:
    """A function of one value, and the largest magnitude of its derivative."""

    of: Callable[[F64], F64]
    slope: float


def _silu(values: F64) -> F64:
    # exp of what is negative only: no overflow.
    sigmoid: F64 = np.exp(np.minimum(values, 0)) / (1 + np.exp(-np.abs(values)))
    return values * sigmoid


def _gelu(values: F64) -> F64:
    # erfc: 1 + erf cancels where values are far below 0. numpy has neither.
    tails = np.fromiter(map(math.erfc, (values / -math.sqrt(2)).flat), np.float64, values.size)
    found: F64 = values * tails.reshape(values.shape) / 2
    return found


def _gelu_tanh(values: F64) -> F64:
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)
    found: F64 = values * (1 + np.tanh(inner)) / 2
    return found


FUNCTIONS: Mapping[str, Function] = {
    SILU: Function(_silu, 1.1),
    GELU: Function(_gelu, 1.13),
    GELU_TANH: Function(_gelu_tanh, 1.13),
}
"""Of every name in `reshard.model.activation.FORMULAS`; the slopes are 1.0998, 1.1289 and 1.1290, rounded up."""


def gated(activation: Activation, gate_IT: F64, up_IT: F64) -> F64:
    """[I, T]. NaN stays NaN."""
    gate_IT, up_IT = _clamped(activation, gate_IT, up_IT)
    return FUNCTIONS[activation.name].of(gate_IT) * up_IT


def carried(activation: Activation, gate_IT: F64, up_IT: F64, gate_error_IT: F64, up_error_IT: F64) -> F64:
    """What of errors of gate and up is in the result, to first order: [I, T].

    That of gate with the function's slope and up's value, that of up with the function's value; a limit enlarges none.
    """
    gate_IT, up_IT = _clamped(activation, gate_IT, up_IT)
    function = FUNCTIONS[activation.name]
    return function.slope * np.abs(up_IT) * gate_error_IT + np.abs(function.of(gate_IT)) * up_error_IT


def _clamped(activation: Activation, gate_IT: F64, up_IT: F64) -> tuple[F64, F64]:
    limit = activation.limit
    return (gate_IT, up_IT) if limit is None else (np.minimum(gate_IT, limit), np.clip(up_IT, -limit, limit))
