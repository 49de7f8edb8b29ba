"""The dense layers of a model that vLLM has built, by its own structure and config: never by part of a name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices

from reshard.errors import ShardError
from reshard.manifest import Manifest
from reshard.model.parts import O_PROJ, Place


def dense_layers(model: nn.Module) -> dict[int, Any]:
    """The dense layers that this process holds (a pipeline stage has its own), by index; `mlp` is each one's MLP.

    A decoder layer knows its index, and its `mlp` is DeepSeek's dense one. vLLM has more than one class of such layers
    (for V3.2 on CUDA its own).
    """
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP  # not where the plugin is only registered

    return {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and isinstance(getattr(module, "mlp", None), DeepseekV2MLP)
    }


def dense_mlps(model: nn.Module) -> dict[int, Any]:
    """Their MLPs."""
    return {index: layer.mlp for index, layer in dense_layers(model).items()}


def dense_by_config(config: Any) -> list[int]:
    """The indices of the whole model's dense layers, as vLLM's decoder layers decide."""
    if getattr(config, "n_routed_experts", None) is None:
        return list(range(config.num_hidden_layers))
    frequency = getattr(config, "moe_layer_freq", 1)
    return [
        index
        for index in range(config.num_hidden_layers)
        if index < config.first_k_dense_replace or index % frequency != 0
    ]


def stage_layers(config: Any) -> range:
    """The layers of this pipeline stage."""
    stage = get_pp_group()
    return range(*get_pp_indices(config.num_hidden_layers, stage.rank_in_group, stage.world_size))


def compare_model(config: Any, manifest: Manifest, folder: str) -> None:
    """The served model's sizes and layers against the set's, as far as its config says them.

    Raises ShardError with both.
    """
    part, known = manifest.what, manifest.model
    keys = [key for key in part.sizes if key != O_PROJ.size]  # which no config says
    if part.place is Place.LAYERS and known.num_hidden_layers is not None:
        keys.append("num_hidden_layers")
    for key in keys:
        served, cut = getattr(config, key, None), getattr(known, key)
        if served != cut:
            raise ShardError(f"{folder}: {key} is {cut}, the served model's is {served}; the set is another model's")
    if part.place is not Place.DENSE_LAYERS:
        return
    served, cut = dense_by_config(config), [layer.index for layer in manifest.layers]
    if served != cut:
        raise ShardError(
            f"{folder}: its dense layers are {_shown(cut)}, the served model's {_shown(served)}; the set is another "
            "model's"
        )


def compare_found(mlps: Mapping[int, Any], config: Any, folder: str) -> None:
    """Whether `mlps` are all dense layers of this pipeline stage. Raises ShardError with both.

    A dense layer of another class would be filled from neither the set nor the model's files.
    """
    here = stage_layers(config)
    dense = [index for index in dense_by_config(config) if index in here]
    if sorted(mlps) != dense:
        raise ShardError(
            f"{folder}: layers {_shown(dense)} are dense here, the engine has built {_shown(sorted(mlps))} as "
            "DeepSeek's dense MLP; denseffn_shards serves DeepSeek models in vLLM's own implementation"
        )


def compare_built(mlps: Mapping[int, Any], share: int, folder: str) -> None:
    """The sizes that were built against a rank's share in the set. Raises ShardError with both."""
    for index, mlp in mlps.items():
        built = (*mlp.gate_up_proj.output_partition_sizes, mlp.down_proj.input_size_per_partition)
        if set(built) != {share}:
            raise ShardError(
                f"{folder}: layer {index}: the engine has built gate, up and down for {', '.join(map(str, built))} of "
                f"intermediate_size, a rank's share in the set is {share}; use a set cut without --pad for the "
                "engine's own partition"
            )


@contextmanager
def intermediate_size(config: Any, size: int) -> Iterator[None]:
    """While a model is built: its dense layers' MLPs take their size from its config, and nothing else of its does.

    vLLM passes one config to everything that it builds, so there is no other place to tell the size of one part.
    """
    whole = config.intermediate_size
    config.intermediate_size = size
    try:
        yield
    finally:
        config.intermediate_size = whole


def _shown(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) or "none"
