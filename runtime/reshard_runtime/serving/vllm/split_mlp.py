"""A dense layer's MLP whose linears hold one rank's part, run over a group of data-parallel ranks.

    x_TH  own tokens              [T, H]
      all_gather                  [D * P, H], or int8 with what the engine quantizes tokens to
      the engine's gate_up, SwiGLU, down: a partial sum
      reduce_scatter              [T, H], which tensor-parallel ranks, if there are any, add up

Shapes: T this rank's tokens, H hidden_size, D the data-parallel ranks of the group, P rows of each (`rows`). A
data-parallel rank's tokens stand on each of its tensor-parallel ranks, so they are gathered over D ranks, not all.
"""

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.utils.torch_utils import direct_register_custom_op

from reshard.checks.serving_option import OPTION
from reshard.errors import UsageError
from reshard.model.parts import GATE_UP
from reshard_runtime.collectives import reduce_dtype_for
from reshard_runtime.kernels import kernels_for
from reshard_runtime.serving.vllm.groups import Group
from reshard_runtime.serving.vllm.rows import Rows
from reshard_runtime.serving.vllm.token_codec import TokenCodec, codec_of, product

_log = init_logger("vllm.denseffn_shards")


class SplitMLP(DeepseekV2MLP):
    """An MLP that the engine has built with one rank's sizes, run over the group by the linears that it has.

    They keep their quantization and kernels. The engine takes them for whole ones, and would cut whatever it loads into
    them to the first rank's part: their parameters refuse that. Raises UsageError for linears that the engine runs in a
    way of its own.
    """

    def __init__(self, built: DeepseekV2MLP, group: Group, rows: Rows, reduce_dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # the engine's own would make the linears again
        for linear in (built.gate_up_proj, built.down_proj):
            _check_built(linear, group.tensor.size())
        self.gate_up_proj, self.down_proj, self.act_fn = built.gate_up_proj, built.down_proj, built.act_fn
        self.layer_name = built.gate_up_proj.prefix.removesuffix(f".{GATE_UP}")
        self.group, self.rows, self.reduce_dtype = group, rows, reduce_dtype
        self.codec: TokenCodec | None = None
        for parameter in self.parameters():
            parameter.weight_loader = _refuse_to_load
        record_metadata_for_reloading(self)  # what the engine makes the parameters of again, before it reloads them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]. One opaque operator, so that torch.compile neither traces nor moves the collectives."""
        return torch.ops.vllm.denseffn_split(x, self.layer_name)

    def run(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The same, not as an operator. Nothing waits for the device, and no shape depends on what is on it.

        Raises GroupError without token counts or where another rank has failed, TokensError for tokens that do not
        fit.
        """
        group, rows, own = self.group, self.rows, len(x_TH)
        layout = rows.layout(own, self.layer_name)
        _log.debug("%s rank %d of %d: tokens %s", self.layer_name, group.rank, group.size, layout.counts)
        if layout.total == 0:
            return torch.empty_like(x_TH)
        if self.codec is None:  # only now are the weights in the form that the kernels want
            self.codec = codec_of(self.gate_up_proj, x_TH.dtype)
        kernels, size = kernels_for(x_TH.device), group.data.size()
        collectives = group.meet(kernels.collectives, group.data)
        reduce_dtype = self.reduce_dtype or reduce_dtype_for(collectives, group.size, x_TH.dtype)
        packed = self.codec.pack(x_TH if own else x_TH.new_zeros(1, x_TH.shape[1]))  # kernels take none that is empty
        sent = rows.place("sent", packed, layout, 1)
        gathered = rows.result("gathered", layout, size, sent, sent.dtype)
        gathered = group.meet(collectives.gather, sent, gathered, layout.counts)
        h = self.act_fn(self.codec.multiply(layout.drop_padding(gathered)))
        partial = layout.restore_padding(product(self.down_proj, h).to(reduce_dtype))
        partial = rows.place("partial", partial, layout, size)
        kept = rows.result("summed", layout, 1, partial, torch.float32 if collectives.in_float32 else reduce_dtype)
        y_TH = group.meet(collectives.reduce_scatter, partial, kept)[:own]
        if group.tensor.size() > 1 and own and self.down_proj.reduce_results:  # else the next layer adds them up
            of_tensor = group.meet(kernels.collectives, group.tensor)
            y_TH = group.meet(of_tensor.all_reduce, y_TH.to(reduce_dtype))
        return y_TH.to(x_TH.dtype, copy=kept is not None)


def _check_built(linear: nn.Module, tensor_parallel_size: int) -> None:
    """vllm-ascend gives a linear a `custom_op` that moves its tokens: flashcomm1, matmul_allreduce, its own split."""
    if linear.tp_size != tensor_parallel_size:
        raise UsageError(
            f"{linear.prefix}: the engine has built it for tensor-parallel size {linear.tp_size} of "
            f"{tensor_parallel_size}: its tokens are layout to the tensor-parallel ranks (sequence parallelism), which "
            f"{OPTION} does not go with; leave one of the two out"
        )
    moved_by = getattr(linear, "custom_op", None)
    if moved_by is not None:
        raise UsageError(
            f"{linear.prefix}: vllm-ascend runs it by {type(moved_by).__name__}, which moves tokens in a way of its "
            f"own; leave out what asks for that (enable_flashcomm1, matmul_allreduce), or {OPTION}"
        )


def _refuse_to_load(param: torch.Tensor, loaded_weight: torch.Tensor, *place: object) -> None:
    raise UsageError(
        f"a dense layer's weight {list(loaded_weight.shape)} was sent to a rank that holds a part of it: "
        "denseffn_shards fills that from the shards, once, at start; start the engine again"
    )


def _denseffn_split(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[layer_name].run(x)


def _denseffn_split_fake(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="denseffn_split", op_func=_denseffn_split, fake_impl=_denseffn_split_fake)
