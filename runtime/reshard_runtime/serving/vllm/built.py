"""What vLLM, or vllm-ascend, has built of a part: found by the checkpoint's names, and asked for its rank and size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from reshard.errors import ShardError
from reshard.manifest import Manifest
from reshard.model.naming import linear_name, numbers, parse_tensor
from reshard.model.parts import DENSE_FFN, EMBEDDING, LM_HEAD, Part, Place
from reshard_runtime.loader import StoredSet
from reshard_runtime.serving.vllm.groups import Group
from reshard_runtime.serving.vllm.model_layers import (
    compare_found,
    compare_model,
    dense_mlps,
    stage_layers,
)

Linears = dict[int | None, dict[str, Any]]
"""By layer, None of a part that the model has once, then by the name that a shard has for it."""


@dataclass(frozen=True)
class Built:
    """What this process holds of a part: its linears by layer and name, the ranks and sizes that they are built for.

    groups: of layers that are split over data-parallel ranks; none of the engine's own partition.
    """

    linears: Linears
    places: frozenset[tuple[int, int]]
    groups: Sequence[Group] = ()

    def __iter__(self) -> Iterator[Any]:
        """Every linear."""
        for linears in self.linears.values():
            yield from linears.values()


def built_for(model: nn.Module, config: Any, stored: StoredSet) -> Built:
    """What there is of a set's part. config: the served language model's.

    Raises ShardError where the model's layers or sizes are not the set's.
    """
    compare_model(config, stored.manifest, str(stored.folder))
    if stored.manifest.what is DENSE_FFN:
        return _dense(model, config, str(stored.folder))
    return _other(model, config, stored.manifest, str(stored.folder))


def _dense(model: nn.Module, config: Any, folder: str) -> Built:
    mlps = dense_mlps(model)
    compare_found(mlps, config, folder)
    linears: Linears = {
        index: {module.name: getattr(mlp, module.name) for module in DENSE_FFN.modules} for index, mlp in mlps.items()
    }
    groups = [mlp.group for mlp in mlps.values() if hasattr(mlp, "group")]
    places = {(group.rank, group.size) for group in groups} or _places(linears)
    return Built(linears, frozenset(places), groups)


def _other(model: nn.Module, config: Any, manifest: Manifest, folder: str) -> Built:
    linears = _named(model, manifest.what, folder)
    _compare_layers(linears, config, manifest, folder)
    for layer, found in linears.items():
        _compare_sizes(found, layer, manifest, folder)
    if manifest.what is LM_HEAD:
        _refuse_tied(model, linears, folder)
    return Built(linears, frozenset(_places(linears)))


def _named(model: nn.Module, part: Part, folder: str) -> Linears:
    """By layer and name. A pipeline stage has something else in the place of what it does not hold."""
    found: dict[str, Linears] = {}
    for name, module in model.named_modules():
        parsed = parse_tensor(f"{name}.weight", part)
        if parsed is not None and isinstance(module, LinearBase | VocabParallelEmbedding):
            found.setdefault(parsed.prefix, {}).setdefault(parsed.layer, {})[parsed.role] = module
    if len(found) > 1:
        raise ShardError(
            f"{folder}: the engine has {part.name} under {' and '.join(map(repr, found))}: which is the language "
            "model's cannot be told; take this set away"
        )
    return next(iter(found.values()), {})


def _compare_layers(linears: Linears, config: Any, manifest: Manifest, folder: str) -> None:
    """Whether the linears are all that this pipeline stage has of the set's part: the engine would not load others."""
    part, stage = manifest.what, get_pp_group()
    if part.place.in_layers:
        here = stage_layers(config)
        wanted = [layer.number for layer in manifest.layers if layer.number in here]
        found = sorted(layer for layer in linears if layer is not None)
        if found != wanted:
            raise ShardError(
                f"{folder}: layers {numbers(wanted)} have {part.name} here, the engine has built it in "
                f"{numbers(found)}; cut the shards from the very model that is served"
            )
    elif not linears and (stage.is_last_rank if part.place is Place.HEAD else stage.is_first_rank):
        raise ShardError(
            f"{folder}: the engine has built nothing that is called …{part.modules[0].name}, or has it in a way of its "
            f"own; take this set away: the engine loads the {part.name} itself then"
        )


def _compare_sizes(found: Mapping[str, Any], layer: int | None, manifest: Manifest, folder: str) -> None:
    """Padded vocabularies of different sizes may have parameters of one shape."""
    for role in manifest.what.roles:
        linear = found[role.name]
        is_vocabulary = isinstance(linear, VocabParallelEmbedding)
        out, in_ = (
            (linear.org_vocab_size, linear.embedding_dim) if is_vocabulary else (linear.output_size, linear.input_size)
        )
        for size, built in ((role.out, out), (role.in_, in_)):
            cut = getattr(manifest.model, size)
            if cut != built:
                name = linear_name(manifest.model.prefix, layer, role.name, manifest.what)
                raise ShardError(
                    f"{folder}: {size} is {cut}, the engine's {name} has {built}; the set is another model's"
                )


def _refuse_tied(model: nn.Module, linears: Linears, folder: str) -> None:
    heads = {id(head.weight) for each in linears.values() for head in each.values()}
    embeddings = _named(model, EMBEDDING, folder).values()
    if heads & {id(linear.weight) for each in embeddings for linear in each.values()}:
        raise ShardError(
            f"{folder}: the served model's LM head is its embedding (tie_word_embeddings), which --part embedding "
            "cuts; take this set away"
        )


def _places(linears: Linears) -> set[tuple[int, int]]:
    return {_place(linear) for each in linears.values() for linear in each.values()}


def _place(linear: Any) -> tuple[int, int]:
    """(rank, size). vLLM's own embeddings tell their rank by the rows that they hold only."""
    if isinstance(linear, VocabParallelEmbedding):
        rows = linear.shard_indices
        return rows.padded_org_vocab_start_index // rows.num_org_elements_padded, linear.tp_size
    return linear.tp_rank, linear.tp_size
