"""The real vllm-ascend without a server: what runs in each process of a `tests.support.distributed.Ranks`.

Each function takes the group first, in a process that `stand_ins.put_in` has prepared. What NPUWorker and
NPUModelRunner do before a model is loaded is done here in their order: they themselves cannot be imported without CANN.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support.reads import Reads, counted
from tests.vllm import inside as vllm_inside
from tests.vllm.inside import tokens

Tensors = dict[str, torch.Tensor]

# A decode node of a disaggregated deployment: what a user says, for `Served.engine`.
DECODE_NODE = {
    "enable_expert_parallel": True,
    "kv_transfer_config": {"kv_connector": "MooncakeConnectorV1", "kv_role": "kv_consumer"},
}


@dataclasses.dataclass(frozen=True)
class Served(vllm_inside.Served):
    """Also the Atlas generation that vllm-ascend takes itself to be installed for.

    mlp: vllm-ascend's own split, finegrained_tp_config.mlp_tensor_parallel_size; finegrained: its other sizes there.
    draft: it is loaded as another's. environment: variables that vllm-ascend reads.
    """

    dtype: str = "bfloat16"
    atlas: str = "A2"
    mlp: int | None = None
    finegrained: dict[str, int] = dataclasses.field(default_factory=dict)
    draft: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# What vllm-ascend remembers of the one model that its process serves; here a process serves one after the other.
_REMEMBERED = {
    "_IS_MOE_MODEL",
    "_IS_DRAFTER_MOE_MODEL",
    "_IS_VL_MODEL",
    "_ENABLE_SP",
    "_HAS_LAYER_IDX",
    "_HAS_ROPE",
    "_WEIGHT_PREFETCH_METHOD",
    "_potential_max_tokens",
    "_mc2_tokens_capacity",
    "_reserved_mc2_mask",
}
_joined: list[tuple[Any, ...]] = []


def config_of(served: Served) -> Any:
    """The VllmConfig of this process, which has become the worker that serves it."""
    import vllm_ascend.utils
    from vllm.config import KVTransferConfig

    _forget()
    vllm_ascend.utils._ascend_device_type = vllm_ascend.utils.AscendDeviceType[served.atlas]
    additional = dict(served.additional)
    sizes = served.finegrained | ({} if served.mlp is None else {"mlp_tensor_parallel_size": served.mlp})
    if sizes:
        additional["finegrained_tp_config"] = sizes
    engine = dict(served.engine)
    if isinstance(transfer := engine.get("kv_transfer_config"), dict):
        engine["kv_transfer_config"] = KVTransferConfig(**transfer)
    config = vllm_inside.engine_config(dataclasses.replace(served, additional=additional, engine=engine))
    _become_worker(config)
    if served.draft:
        config.model_config.runner_type = "draft"
    return config


def _forget() -> None:
    from vllm_ascend import ascend_config, ascend_forward_context, utils
    from vllm_ascend.ops.fused_moe import moe_comm_method

    ascend_config.clear_ascend_config()
    moe_comm_method._MoECommMethods.clear()
    for module in (utils, ascend_forward_context):
        for name in _REMEMBERED & vars(module).keys():
            setattr(module, name, None)


def _become_worker(config: Any) -> None:
    """As NPUWorker.__init__, its init_device and NPUModelRunner.__init__ do."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from vllm_ascend import ascend_forward_context as forward_context
    from vllm_ascend import ops, utils
    from vllm_ascend.ascend_config import get_ascend_config, init_ascend_config

    utils.adapt_patch()
    ops.register_dummy_fusion_op()
    with set_current_vllm_config(config):
        utils.register_ascend_customop(config)
        init_ascend_config(config)
        if "UnquantizedLinearMethod" in WEIGHT_LOADER_V2_SUPPORTED:
            WEIGHT_LOADER_V2_SUPPORTED.remove("UnquantizedLinearMethod")
        _join(config)
        if hasattr(utils, "set_weight_prefetch_method"):
            utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
        speculative = config.speculative_config
        queries = 1 + (speculative.num_speculative_tokens if speculative else 0)
        forward_context.set_mc2_tokens_capacity(config, config.scheduler_config.max_num_seqs, queries)
        forward_context.set_mc2_mask(config, torch.device("cpu"))
        if hasattr(utils, "set_potential_max_tokens"):
            utils.set_potential_max_tokens(config)


def _join(config: Any) -> None:
    """vLLM's groups and vllm-ascend's, made again only where the layout is another."""
    from vllm.distributed import parallel_state
    from vllm_ascend.ascend_config import get_ascend_config
    from vllm_ascend.distributed import parallel_state as ascend_state

    parallel = config.parallel_config
    sizes = tuple(sorted(vars(get_ascend_config().finegrained_tp_config).items()))
    layout = (parallel.data_parallel_size, parallel.pipeline_parallel_size, parallel.tensor_parallel_size, sizes)
    if _joined == [layout]:
        return
    if _joined:
        ascend_state.destroy_ascend_model_parallel()
        parallel_state.destroy_model_parallel()
    _joined[:] = [layout]
    rank = dist.get_rank() % parallel.world_size
    parallel_state.init_distributed_environment(parallel.world_size, rank, "env://", rank, "gloo")
    parallel_state.ensure_model_parallel_initialized(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    ascend_state.init_ascend_model_parallel(parallel)


def loaded(served: Served) -> tuple[Any, Any]:
    """(config, model), ready to run. Raises what the engine raises."""
    config, model, _ = _load(served)
    return config, model


def _load(served: Served) -> tuple[Any, Any, Tensors]:
    """(config, model, its tensors before kernels have packed them)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model

    before: Tensors = {}

    def process_weights(model: Any, *args: Any) -> None:
        before.update(_tensors(model))
        process(model, *args)

    with mock.patch.dict(os.environ, served.environment), _nothing_is_left_empty():
        config = config_of(served)
        process = base_loader.process_weights_after_loading  # vllm-ascend's
        with (
            set_current_vllm_config(config),
            mock.patch.object(base_loader, "process_weights_after_loading", process_weights),
        ):
            return config, get_model(vllm_config=config), before


@contextlib.contextmanager
def _nothing_is_left_empty() -> Iterator[None]:
    """Tensors that are made empty hold what torch fills them with: the same, whoever loads nothing into them."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _tensors(model: Any) -> Tensors:
    """Every tensor that a module of the model has: parameters, buffers, and those that are neither."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.named_modules()
        for key, value in (module._parameters | module._buffers | vars(module)).items()
        if isinstance(value, torch.Tensor)
    }


def parameters(group: dist.ProcessGroup, served: Served) -> tuple[Tensors, Tensors]:
    """Every tensor of the model, as it was loaded and as it is after process_weights_after_loading."""
    _, model, before = _load(served)
    return before, _tensors(model)


def reads(group: dist.ProcessGroup, served: Served) -> Reads:
    """What loading it reads of its model and of its sets."""
    with counted(served.model, *([] if served.shards is None else [served.shards])) as found:
        loaded(served)
    return found


def classes(group: dist.ProcessGroup, served: Served) -> dict[str, str]:
    """The class of each module."""
    _, model = loaded(served)
    return {name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()}


def dense_linears(group: dist.ProcessGroup, served: Served) -> set[tuple[str, str, int, int]]:
    """(class, what moves its tokens, rank, size) of the dense layers' linears."""
    from reshard_runtime.serving.vllm.model_layers import dense_mlps

    _, model = loaded(served)
    return {
        (type(linear).__name__, type(linear.custom_op).__name__, linear.tp_rank, linear.tp_size)
        for mlp in dense_mlps(model).values()
        for linear in (mlp.gate_up_proj, mlp.down_proj)
    }


def of_parts(group: dist.ProcessGroup, served: Served) -> dict[str, tuple[str, str, int, int]]:
    """(class, what moves its tokens or rows, rank, size) of the linears of o_proj, the LM head and the embedding."""
    _, model = loaded(served)
    return {
        name: (
            type(module).__name__,
            type(getattr(module, "custom_op", None)).__name__,
            module.tp_rank,
            module.tp_size,
        )
        for name, module in model.named_modules()
        if name.endswith((".o_proj", "lm_head", "embed_tokens"))
    }


def warnings(group: dist.ProcessGroup, served: Served) -> list[str]:
    """What the plugin warns of."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("vllm.denseffn_shards")
    logger.addHandler(handler)
    try:
        loaded(served)
    finally:
        logger.removeHandler(handler)
    return said


def load(group: dist.ProcessGroup, served: Served) -> str:
    """Load it and let it go; what was raised."""
    try:
        loaded(served)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def load_unbuilt(group: dist.ProcessGroup, served: Served) -> str:
    """As `load`: what is raised before anything is built."""
    with vllm_inside.nothing_is_built():
        return load(group, served)


def data_parallel_rank(config: Any) -> int:
    """This process's."""
    return int(config.parallel_config.data_parallel_rank)


@contextlib.contextmanager
def forward_context(config: Any, model: Any, counts: list[int], requests: bool = True) -> Iterator[None]:
    """vllm-ascend's, with what its runner would say of `counts`, a token count for each data-parallel rank.

    Without `requests` as in memory profiling and warm-up, which have no attention metadata.

    Where vllm-ascend does not exchange them (`should_skip_allreduce_across_dp_group`), a rank's own stands for all.
    """
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context
    from vllm_ascend.utils import should_skip_allreduce_across_dp_group

    own = counts[data_parallel_rank(config)]
    told = None
    if len(counts) > 1:
        told = torch.tensor([own] * len(counts) if should_skip_allreduce_across_dp_group(config) else counts)
    with (
        torch.inference_mode(),
        set_ascend_forward_context(
            {} if requests else None, config, num_tokens=own, num_tokens_across_dp=told, model_instance=model
        ),
    ):
        yield


def forward(group: dist.ProcessGroup, served: Served, counts: list[list[int]]) -> list[list[torch.Tensor]]:
    """The dense MLPs' results of each of `counts` (a token count for each data-parallel rank), layer by layer.

    A data-parallel rank's tokens are the same on all its tensor-parallel ranks.
    """
    from reshard_runtime.serving.vllm.model_layers import dense_mlps

    results = []
    config, model = loaded(served)
    hidden, rank = config.model_config.hf_config.hidden_size, data_parallel_rank(config)
    for each in counts:
        x = tokens(rank, each[rank], hidden, config.model_config.dtype)
        with forward_context(config, model, each):
            results.append([mlp(x).clone() for mlp in dense_mlps(model).values()])
    return results


def forward_of_parts(group: dist.ProcessGroup, served: Served, ids: torch.Tensor) -> Tensors:
    """By module, the results of the embedding for `ids`, of o_proj and the LM head for as many of a rank's `tokens`.

    Every rank has the same number.
    """
    config, model = loaded(served)
    dtype, rank, count = config.model_config.dtype, data_parallel_rank(config), len(ids)
    found = {}
    with forward_context(config, model, [count] * config.parallel_config.data_parallel_size):
        found["model.embed_tokens"] = model.model.embed_tokens(ids).clone()
        hidden = tokens(rank, count, config.model_config.hf_config.hidden_size, dtype)
        found["lm_head"] = model.compute_logits(hidden).clone()
        for name, module in model.named_modules():
            if name.endswith(".o_proj"):
                result = module(tokens(rank, count, module.input_size, dtype))
                found[name] = (result[0] if isinstance(result, tuple) else result).clone()
    return found


def exchanges_counts(group: dist.ProcessGroup, served: Served) -> bool:
    """Whether vllm-ascend tells each data-parallel rank the others' token counts."""
    from vllm_ascend.utils import should_skip_allreduce_across_dp_group

    return not should_skip_allreduce_across_dp_group(config_of(served))
