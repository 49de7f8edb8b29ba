"""The load format `denseffn_shards`: parts of the model from shards, everything else as vLLM's default loader has it.

With the option (`reshard.checks.serving_option`), `create_model` builds the dense layers with one rank's sizes and
splits them over a group. Without it, and in every other part, the engine's own partition is filled: plain tensor
parallelism, or vllm-ascend's groups. Either way `load_weights` asks the built layers for their rank and size.

vLLM's loaders have `create_model` since 0.30; where they have not, it takes the place of the function that they call.
"""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import get_dp_group, get_pp_group, get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.model_loader.utils import initialize_model

from reshard.checks.serving_option import OPTION, option_of
from reshard.errors import ShardError, UsageError
from reshard.manifest import Manifest
from reshard_runtime.group import agreement
from reshard_runtime.serving.vllm.ascend import fixed_rows, is_platform, is_rehearsal
from reshard_runtime.serving.vllm.built import built_for
from reshard_runtime.serving.vllm.compat import refuse, refuse_elastic, split_size
from reshard_runtime.serving.vllm.filling import fill_from, is_used
from reshard_runtime.serving.vllm.groups import make_group
from reshard_runtime.serving.vllm.model_layers import compare_model, dense_layers, intermediate_size
from reshard_runtime.serving.vllm.other_weights import check_same, read_others
from reshard_runtime.serving.vllm.rows import Counted, Fixed, Rows
from reshard_runtime.serving.vllm.serving_options import parse
from reshard_runtime.serving.vllm.shard_sets import dense_of, digest_of, open_sets
from reshard_runtime.serving.vllm.stand_ins import watched

_LAZY = (None, "lazy")


class DenseFFNShardsLoader(DefaultModelLoader):
    """Raises what `reshard.errors` has: on every rank of the group, with the message of the one that failed."""

    def __init__(self, load_config: LoadConfig) -> None:
        self.options, engines = parse(load_config.model_loader_extra_config)
        strategy = load_config.safetensors_load_strategy
        if strategy not in _LAZY:
            raise UsageError(
                f"safetensors_load_strategy {strategy!r} reads whole files, and denseffn_shards reads only what the "
                "shards do not hold; leave it out, or 'lazy'"
            )
        own = dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=engines)
        super().__init__(own)
        self._built_from: str | None = None  # the digests of the sets that the model was built for

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As the engine does it, with a say in what is built."""
        in_its_place = _in_place_of(base_loader, "initialize_model", self.create_model)
        with contextlib.nullcontext() if hasattr(DefaultModelLoader, "create_model") else in_its_place:
            return super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The model, its dense layers with one rank's sizes where the option is set."""
        build = getattr(super(), "create_model", initialize_model)
        if _is_draft(model_config):
            return build(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        refuse_elastic(vllm_config)
        additional, tensor = _additional(vllm_config), get_tp_group()
        size = split_size(additional, tensor.world_size)
        config = model_config.hf_text_config
        with agreement(*_loading_groups()) as own:
            with open_sets(self.options.shards) as sets:
                own["shard set"] = self._built_from = digest_of(sets)
            sizes = {stored.manifest.what: stored.manifest.tp_size for stored in sets}
            refuse(vllm_config, additional, model_config.is_moe, sizes, ascend=is_platform())
            for stored in sets:
                compare_model(config, stored.manifest, str(stored.folder))
            fixed = fixed_rows(vllm_config, size is not None, self.options.max_tokens)
            own |= {OPTION: option_of(additional), "reduce_dtype": self.options.reduce_dtype, "max_tokens": fixed}
        dense = dense_of(sets)
        if size is None or dense is None:
            return build(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        data = get_dp_group()
        group = make_group(data.ranks, data.device_group, tensor.device_group, size)
        rows: Rows = Counted(group, _token_counts) if fixed is None else Fixed(group, fixed, is_rehearsal)
        with intermediate_size(config, dense.manifest.share * tensor.world_size):
            model = build(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        # Not at the top: it imports the engine's model, and `register` must not.
        from reshard_runtime.serving.vllm.split_mlp import SplitMLP

        for layer in dense_layers(model).values():
            layer.mlp = SplitMLP(layer.mlp, group, rows, self.options.reduce_dtype)
            vllm_config.compilation_config.static_forward_context[layer.mlp.layer_name] = layer.mlp
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """What the sets have from this rank's shards, then the rest from the model's files."""
        if _is_draft(model_config):
            super().load_weights(model, model_config)
            return
        with agreement(*_loading_groups()) as own, open_sets(self.options.shards) as sets:
            own["shard set"] = digest = digest_of(sets)
            if self._built_from not in (None, digest):
                raise ShardError(
                    f"{self.options.shards}: was replaced since the model was built; start the engine again"
                )
            built = [(stored, built_for(model, model_config.hf_text_config, stored)) for stored in sets]
            used = [(stored, linears) for stored, linears in built if is_used(stored, linears, alone=len(sets) == 1)]
            filled = [
                (stored.manifest, fill_from(model, model_config, stored, linears, self.options.verify))
                for stored, linears in used
            ]
        manifests, same = [manifest for manifest, _ in filled], self.options.source == "same"
        with (
            _counted_as_loaded(model, [linear for _, linears in filled for linear in linears]),
            watched(model, filled) as stand_ins,
        ):
            _Others(self.load_config, manifests, stand_ins, same).load_weights(model, model_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """A draft's. Raises UsageError to an engine that loads the served model again."""
        if not _is_draft(model_config):
            raise UsageError("denseffn_shards fills a model once, at start, and does not reload it; start it again")
        return super().get_all_weights(model_config, model)


class _Others(DefaultModelLoader):
    """Loads once: `stand_ins`, and of the model's own files what no set holds.

    same: they must be those the sets were cut from.
    """

    def __init__(
        self, load_config: LoadConfig, manifests: Sequence[Manifest], stand_ins: dict[str, torch.Tensor], same: bool
    ) -> None:
        super().__init__(load_config)
        self._manifests, self._stand_ins, self._same = manifests, stand_ins, same

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        self.counter_before_loading_weights = time.perf_counter()  # the engine logs the time since then
        folder, files, *_ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if self._same:
            check_same(Path(folder), files, self._manifests)

        if not source.prefix:  # the model's own weights, and not what is beside them
            yield from self._stand_ins.items()

        def passed_over(name: str) -> bool:
            return should_skip_weight(name, self.local_expert_ids)

        for name, tensor in read_others(files, self._manifests, passed_over, same=self._same):
            yield source.prefix + name, tensor


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    """The additional config; a platform's own kind of it has no option of ours."""
    return vllm_config.additional_config if isinstance(vllm_config.additional_config, dict) else {}


def _token_counts() -> torch.Tensor | None:
    """Of every data-parallel rank in this step, as the engine has exchanged them."""
    metadata = get_forward_context().dp_metadata
    return None if metadata is None else metadata.num_tokens_across_dp_cpu


def _is_draft(model_config: ModelConfig) -> bool:
    """A speculative model beside the served one: the shards are not its."""
    return bool(model_config.runner_type == "draft")


def _loading_groups() -> list[dist.ProcessGroup]:
    """All ranks that load the set together, by one group after the other."""
    return [group.cpu_group for group in (get_dp_group(), get_tp_group(), get_pp_group())]


@contextlib.contextmanager
def _counted_as_loaded(model: nn.Module, linears: Iterable[nn.Module]) -> Iterator[None]:
    """While the engine loads the rest: its check that nothing is missing does not know of the shards."""
    held = {id(parameter) for linear in linears for parameter in linear.parameters()}
    filled = {name for name, parameter in model.named_parameters() if id(parameter) in held}
    load = model.load_weights

    def load_and_count(*args: Any, **kw: Any) -> set[str] | None:
        loaded: set[str] | None = load(*args, **kw)
        return None if loaded is None else loaded | filled

    with _in_place_of(model, "load_weights", load_and_count):
        yield


@contextlib.contextmanager
def _in_place_of(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`value` as the attribute `name`, for a time."""
    is_own, before = name in vars(owner), getattr(owner, name)  # else its class's
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
