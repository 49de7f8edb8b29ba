"""The linears that the engine has built, filled from a rank's file of a set, one after another."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.logger import init_logger

from reshard.checks.set_size import another_size, cut_again
from reshard.errors import ShardError
from reshard.manifest import LayerEntry, Manifest
from reshard.model.naming import layers_named, parse_tensor
from reshard.model.parts import DENSE_FFN, Parallel, Place
from reshard.schemes.table import VARIANTS, Placement
from reshard_runtime.linears import linears_of
from reshard_runtime.loader import StoredSet, Verify, read_tensors
from reshard_runtime.serving.vllm.activation import compare_activations
from reshard_runtime.serving.vllm.built import Built
from reshard_runtime.serving.vllm.copy_params import fill
from reshard_runtime.serving.vllm.model_layers import compare_built, dense_mlps
from reshard_runtime.shard import LinearShard

_log = init_logger("vllm.denseffn_shards")
_CPU = torch.device("cpu")
_MIB = 1 << 20
_RANK_0 = frozenset(rule.suffix for variant in VARIANTS for rule in variant.tensors if rule.row is Placement.RANK_0)


def is_used(stored: StoredSet, built: Built, *, alone: bool) -> bool:
    """Whether the engine has built a set's part for the set's size, or this pipeline stage has nothing of it.

    Not, where it has built the part whole: it is the engine's to load then, and the log says so. Raises ShardError for
    another size, and for a set that stands alone and is not used.
    """
    part, cut_for = stored.manifest.what, stored.manifest.tp_size
    if not built.places or (size := _place(built, stored)[1]) == cut_for:
        return True
    to_use_it = [f"set {part.option}, or the tensor-parallel size, to {cut_for}"]
    others = [cut_again(part, size)] if size > 1 else []
    broken = another_size(part, cut_for, size, to_use_it=to_use_it, others=others, alone=alone)
    if not broken.warning:
        raise ShardError(f"{stored.folder}: {broken.message}")
    _log.warning("denseffn_shards: %s: %s", stored.folder, broken.message)
    return False


def fill_from(
    model: nn.Module, model_config: ModelConfig, stored: StoredSet, built: Built, verify: Verify
) -> list[Any]:
    """Fill what this process holds of a set's part; the linears. A pipeline stage may have none.

    Raises ShardError where the engine's layers are not the set's.
    """
    start, manifest = time.perf_counter(), stored.manifest
    if not built.places:
        return []
    rank, size = _place(built, stored)
    if manifest.what is DENSE_FFN:
        compare_built(dense_mlps(model), manifest.share, str(stored.folder))
    casts: set[str] = set()
    for layer, shards in _read(stored, built, rank, size, verify):
        for module, shard in zip(manifest.what.modules, shards, strict=True):
            casts |= fill(built.linears[layer.index][module.name], shard)
    if manifest.what is DENSE_FFN:
        compare_activations(dense_mlps(model), manifest, model_config.dtype, str(stored.folder))
    if casts:
        _log.warning("denseffn_shards: the engine's dtype is not the shards': cast %s", ", ".join(sorted(casts)))
    held = sum(parameter.nbytes for linear in built for parameter in linear.parameters())
    _log.info(
        "denseffn_shards: rank %d of %d holds %s, %d bytes (%.3f MiB), from %s in %.2f s",
        rank,
        size,
        _named(manifest, built),
        held,
        held / _MIB,
        manifest.shards[rank].file,
        time.perf_counter() - start,
    )
    return list(built)


def _read(
    stored: StoredSet, built: Built, rank: int, size: int, verify: Verify
) -> Iterator[tuple[LayerEntry, tuple[LinearShard, ...]]]:
    """Layer by layer, in the order of the part's modules.

    What rank 0 alone adds to the sums, the engine's own layers have on every rank: which of them adds it, or whether
    each adds it to the rows that are its own after a reduce-scatter, is the engine's choice (vllm-ascend's quant_bias).
    """
    manifest, layers = stored.manifest, built.linears
    added: dict[str, torch.Tensor] = {}
    if rank > 0 and not built.groups and any(_is_rank_0s(each.name, manifest) for each in manifest.shards[0].tensors):
        for _, tensors in read_tensors(
            stored, 0, _CPU, layers=layers, verify=verify, wanted=lambda name: _is_rank_0s(name, manifest)
        ):
            added |= tensors
    for layer, tensors in read_tensors(stored, rank, _CPU, tp_size=size, layers=layers, verify=verify):
        own = {name: added.get(name, tensor) for name, tensor in tensors.items()}
        yield layer, linears_of(manifest, layer, own, manifest.shards[rank].file)


def _is_rank_0s(name: str, manifest: Manifest) -> bool:
    parsed = parse_tensor(name, manifest.what)
    return (
        parsed is not None and parsed.suffix in _RANK_0 and manifest.what.module(parsed.role).parallel is Parallel.ROW
    )


def _place(built: Built, stored: StoredSet) -> tuple[int, int]:
    """(tp_rank, tp_size) of the linears, from the linears themselves."""
    if len(built.places) != 1:
        raise ShardError(
            f"{stored.folder}: the engine's layers are cut in different ways (rank, size): {sorted(built.places)}"
        )
    (place,) = built.places
    return place


def _named(manifest: Manifest, built: Built) -> str:
    """What this process holds, for the log."""
    part, layers = manifest.what, [layer for layer in built.linears if layer is not None]
    if part.place is Place.DENSE_LAYERS:
        return f"dense layers {', '.join(map(str, layers))}"
    return f"{part.name} of {layers_named(layers)}" if layers else f"the {part.name}"
