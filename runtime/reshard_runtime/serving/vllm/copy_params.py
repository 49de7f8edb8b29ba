"""A rank's tensors into the parameters of a linear that the engine has built partitioned.

The engine's parameters have the names and shapes of the shard's tensors: a shard is cut for that. Nothing is narrowed
or padded. A quantized weight is never cast; what stands beside it takes the type of the engine's parameter, as with the
engine's own loader (vllm-ascend keeps ModelSlim's float32 scales in the model's type, its offsets in int8).
"""

from collections.abc import Mapping

import torch
from torch import nn

from reshard.errors import ShardError
from reshard.schemes.table import scheme_named
from reshard_runtime.shard import LinearShard


def fill(linear: nn.Module, shard: LinearShard) -> set[str]:
    """Copy every tensor of `shard` into the parameter of its name; says which types were cast.

    A scale [N] fits [N, 1]; one scale of a stacked linear stands for each of its parts. Floats are rounded to the
    parameter's type; to and from integers only equal values are taken. A parameter that the engine says it computes
    itself may be absent.

    Raises ShardError where names, shapes or types differ, before anything is copied.
    """
    parameters = {name: value for name, value in linear.named_parameters(recurse=False) if value.numel()}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ShardError(
                f"{shard.name}.{name} has no memory yet: the engine quantizes it while it loads; serve the model "
                "without online quantization, and convert with reshard split --weights"
            )
    absent = parameters.keys() - shard.tensors.keys()
    if not shard.tensors.keys() <= parameters.keys() or not absent <= _computed(linear, shard):
        raise ShardError(
            f"{shard.name}: the engine's layer has {_names(parameters)}, the shard ({shard.scheme}) "
            f"{_names(shard.tensors)}; cut the shards from the very model that is served, without --weights: what the "
            "engine builds is what that model's config says"
        )
    parts = len(getattr(linear, "output_sizes", (1,)))
    fitted = {name: _fitted(shard, name, parameters[name], parts) for name in shard.tensors}
    casts = set()
    for name, value in fitted.items():
        if value.dtype != parameters[name].dtype:
            casts.add(f"{value.dtype} to {parameters[name].dtype}")
        parameters[name].data.copy_(value)
    return casts


def _fitted(shard: LinearShard, suffix: str, parameter: torch.Tensor, parts: int) -> torch.Tensor:
    """The tensor in the parameter's shape, of a type that may be copied."""
    tensor, name = shard.tensors[suffix], f"{shard.name}.{suffix}"
    if tensor.shape != parameter.shape:
        if [size for size in tensor.shape if size != 1] == [size for size in parameter.shape if size != 1]:
            tensor = tensor.reshape(parameter.shape)
        elif tensor.numel() == 1 and parameter.numel() == parts:
            tensor = tensor.reshape([1] * parameter.dim()).expand(parameter.shape)
        else:
            raise ShardError(
                f"{name} is {list(tensor.shape)}, the engine's parameter {list(parameter.shape)}; cut the shards from "
                "the very model that is served, without --pad"
            )
    if tensor.dtype == parameter.dtype:
        return tensor
    floats = all(each.is_floating_point() and each.element_size() > 1 for each in (tensor, parameter))
    if suffix == "weight":
        may_be_cast = floats and scheme_named(shard.scheme, shard.name).is_float
    else:
        may_be_cast = floats or torch.equal(tensor.to(parameter.dtype).to(tensor.dtype), tensor)
    if may_be_cast:
        return tensor
    raise ShardError(
        f"{name} is {tensor.dtype}, the engine's parameter {parameter.dtype}; quantized values are not cast: cut the "
        "shards from the very model that is served"
    )


def _computed(linear: nn.Module, shard: LinearShard) -> frozenset[str]:
    """What vllm-ascend's methods say they compute or need not: llm-compressor writes no offsets, say.

    `get_computed_params` of vllm_ascend/quantization/method_adapters.py. It lists the weight's scale, which only
    ModelSlim's static W8A8 may leave out: there deq_scale stands for it.
    """
    computed = getattr(getattr(linear, "quant_method", None), "get_computed_params", None)
    needed = {"weight"} if "deq_scale" in shard.tensors else {"weight", "weight_scale"}
    return frozenset(computed() if computed else ()) - needed


def _names(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(sorted(tensors)) or "none"
