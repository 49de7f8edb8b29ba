"""Values that gate and up hold each and the fused layout holds once: they must be the same bits."""

from collections.abc import Callable

import numpy as np

from reshard.checkpoint.description import Checkpoint, Tensor
from reshard.errors import SchemeError
from reshard.model.naming import GATE, UP
from reshard.schemes import Placement
from reshard.tensors.byte_grid import BlockReader, read_whole
from reshard.tensors.numeric import storage, to_f32


def check_shared_values(checkpoint: Checkpoint, reader: Callable[[Tensor], BlockReader]) -> None:
    """Raises SchemeError with both values where gate and up differ in what they are to share."""
    for layer in checkpoint.layers:
        gate, up = layer.linears[GATE], layer.linears[UP]
        for rule in gate.variant.tensors:
            if rule.column is not Placement.REPLICATED:
                continue
            one, other = gate.tensors[rule.suffix], up.tensors[rule.suffix]
            first, second = read_whole(reader(one), one), read_whole(reader(other), other)
            if first != second:
                raise SchemeError(
                    f"{one.name} is {_shown(first, one.dtype)}, {other.name} is {_shown(second, other.dtype)}; the "
                    "fused layout holds one for both: use --layout separate"
                )


def _shown(raw: bytes, dtype: str) -> str:
    return f"{to_f32(np.frombuffer(raw, storage(dtype)), dtype)[0]:.9g}"
