"""Values that stacked linears hold each and the fused layout holds once: they must be the same bits."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from reshard.checkpoint.description import Checkpoint, Tensor
from reshard.errors import SchemeError
from reshard.model.parts import Parallel
from reshard.schemes.table import Placement
from reshard.tensors.byte_grid import BlockReader, read_whole


def check_shared_values(checkpoint: Checkpoint, reader: Callable[[Tensor], BlockReader]) -> None:
    """Raises SchemeError with both values where linears differ in what they are to share."""
    for layer in checkpoint.layers:
        for module, linears in layer.modules("fused"):
            for rule in linears[0].variant.tensors:
                if (rule.column if module.parallel is Parallel.COLUMN else rule.row) is not Placement.REPLICATED:
                    continue
                for one, other in pairwise(linear.tensors[rule.suffix] for linear in linears):
                    first, second = read_whole(reader(one), one), read_whole(reader(other), other)
                    if first != second:
                        raise SchemeError(
                            f"{one.name} is {_shown(first, one.dtype)}, {other.name} is {_shown(second, other.dtype)}; "
                            "the fused layout holds one for both: use --layout separate"
                        )


def _shown(raw: bytes, dtype: str) -> str:
    from reshard.tensors.numeric import storage, to_f32  # of a split only this needs ml_dtypes

    return f"{to_f32(np.frombuffer(raw, storage(dtype)), dtype)[0]:.9g}"
