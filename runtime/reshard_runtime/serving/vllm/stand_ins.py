"""Whether the engine takes what shards have filled as it is stored: its own loading is shown stand-ins for it.

A model's `load_weights` may change a tensor on its way to a parameter (BailingMoE's normalizes the LM head). A stand-in
has the tensor's name, shape and type, and the memory of one element.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from reshard.errors import ShardError
from reshard.manifest import Manifest
from reshard.model.parts import DENSE_FFN
from reshard.tensors.dtypes import TORCH


@contextlib.contextmanager
def watched(model: nn.Module, filled: Sequence[tuple[Manifest, list[Any]]]) -> Iterator[dict[str, torch.Tensor]]:
    """While the engine loads: the stand-ins that it is to load with the rest, by name. Nothing is copied of them.

    filled: the linears that a set has filled. There are none for the DenseFFN, whose class is known. Raises ShardError
    where a parameter is given anything else, or a weight nothing.
    """
    others = [(manifest, linears) for manifest, linears in filled if linears and manifest.what is not DENSE_FFN]
    stand_ins = {name: tensor for manifest, _ in others for name, tensor in _of(manifest).items()}
    held = {id(each) for _, linears in others for linear in linears for each in linear.parameters()}
    parameters = {name: each for name, each in model.named_parameters() if id(each) in held}
    taken: set[str] = set()
    with contextlib.ExitStack() as restored:
        for name, parameter in parameters.items():
            restored.callback(_give_back, parameter, getattr(parameter, "weight_loader", None))
            parameter.weight_loader = _taker(name, stand_ins, taken)
        yield stand_ins
    for name in parameters:
        if name.endswith(".weight") and name not in taken:
            raise _not_as_stored(name)


def _of(manifest: Manifest) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for tensor in (tensor for shard in manifest.shards for tensor in shard.tensors):
        for piece in tensor.slices:
            if piece.tensor not in found:
                dtype = getattr(torch, TORCH[tensor.dtype])
                one = torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype)
                found[piece.tensor] = one.reshape(()).expand(piece.shape)
    return found


def _taker(parameter: str, stand_ins: dict[str, torch.Tensor], taken: set[str]) -> Callable[..., None]:
    places = {tensor.untyped_storage().data_ptr(): tensor.shape for tensor in stand_ins.values()}

    def take(_: Any, given: torch.Tensor, *place: Any, **more: Any) -> None:
        if places.get(given.untyped_storage().data_ptr()) != given.shape:
            raise _not_as_stored(parameter)
        taken.add(parameter)

    return take


def _give_back(parameter: Any, weight_loader: Callable[..., None] | None) -> None:
    if weight_loader is None:
        del parameter.weight_loader
    else:
        parameter.weight_loader = weight_loader


def _not_as_stored(parameter: str) -> ShardError:
    return ShardError(
        f"{parameter}: the engine does not load it as it is stored, and shards are filled so; take the set of the part "
        "away: the engine loads it itself then"
    )
