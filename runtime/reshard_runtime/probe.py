"""What a model's own MLP computes between its matrices, asked of its code with a few values of gate and up.

Its linears are left out, so that no weights are needed: it can be asked before they are loaded.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from reshard.model.activation import Activation
from reshard_runtime.kernels.base import clamped, gated

# Every pair of them is asked. 2.25 is where the two gelus differ most; limits in the field are from 7 to 16.
_MAGNITUDES = (0.25, 1.0, 2.25, 4.0, 6.5, 7.5, 9.5, 10.5, 15.0, 17.0, 40.0, 100.0, 200.0, 0.0, 0.5, 3.0)
# Roundings in a type: of the function, of the product, and one more that a kernel may make.
_ROUNDINGS = {torch.bfloat16: 3 * 2.0**-8, torch.float16: 3 * 2.0**-11, torch.float32: 2.0**-18}
_CANCELS = 2.0**-20  # of gate * up: below 0 a function may be the difference of two larger float32 numbers
_LEAST = 2.0**-24  # of up, and of the result: FP16 has none between


def without_linears(mlp: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The MLP's own forward with `stand_ins` for its linears, by name; the MLP itself is left as it is."""
    bare = copy.copy(mlp)
    bare._modules = {**mlp._modules, **stand_ins}
    return lambda h_T2L: type(mlp).forward(bare, h_T2L)


@torch.no_grad()
def answers(
    between: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[T, L]: what it makes of each of the values as gate (a token has one) and as up."""
    return between(_asked(dtype, device)).to("cpu", torch.float64)


def disagreement(found_TL: torch.Tensor, activation: Activation, dtype: torch.dtype) -> str | None:
    """Where `answers` in `dtype` are not what the activation makes; None where they are, but for rounding."""
    asked = _asked(dtype, "cpu").double()
    gate_TL, up_TL = clamped(asked.clone(), activation.limit).chunk(2, dim=-1)
    wanted_TL = gated(activation)(asked.clone())
    if found_TL.shape != wanted_TL.shape:
        return f"of gate and up {list(wanted_TL.shape)} it makes {list(found_TL.shape)}"
    allowed_TL = _ROUNDINGS[dtype] * wanted_TL.abs() + _CANCELS * (gate_TL * up_TL).abs() + _LEAST * (up_TL.abs() + 1)
    off_TL = ((found_TL - wanted_TL).abs() / allowed_TL).nan_to_num(nan=torch.inf)
    at = int(off_TL.argmax())
    if off_TL.flatten()[at] <= 1:
        return None
    gate_TL, up_TL = asked.chunk(2, dim=-1)
    gate, up, found, wanted = (float(values.flatten()[at]) for values in (gate_TL, up_TL, found_TL, wanted_TL))
    return f"of gate {gate:g} and up {up:g} it makes {found:.6g}, {activation} makes {wanted:.6g}"


def _asked(dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """[T, 2L], gate in the left half."""
    values = torch.tensor((*_MAGNITUDES, *(-value for value in _MAGNITUDES)), dtype=dtype, device=device)
    gate_TL = values[:, None].expand(-1, len(values))
    return torch.cat([gate_TL, gate_TL.t()], dim=1)
