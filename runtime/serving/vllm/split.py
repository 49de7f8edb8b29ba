"""A dense layer's MLP whose linears hold one rank's part, run over a group of data-parallel ranks.

    x_TH  own tokens              [T, H]
      all_gather                  [sum of T, H], or int8 with a scale for each token
      the engine's gate_up, SwiGLU, down: a partial sum
      reduce_scatter              [T, H]

Shapes: T this rank's tokens, H hidden_size. How many tokens each rank has, vLLM has already told every rank; so the
sizes of the collectives are the same everywhere, and nothing is exchanged for them.
"""

import torch
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP
from vllm.utils.torch_utils import direct_register_custom_op

from reshard.errors import GroupError, TokensError, UsageError
from runtime.collectives import reduce_dtype_for
from runtime.kernels import kernels_for
from runtime.serving.vllm.groups import Group
from runtime.serving.vllm.travel import Travel, travel_of
from runtime.tokens import deal, pad

_log = init_logger("vllm.denseffn_shards")


class SplitMLP(DeepseekV2MLP):
    """The engine's MLP after `split`; its linears are the engine's own, with their quantisation and kernels."""

    layer_name: str
    group: Group
    reduce_dtype: torch.dtype | None
    _travel: Travel | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]. One opaque operator, so that torch.compile neither traces nor moves the collectives."""
        return torch.ops.vllm.denseffn_split(x, self.layer_name)

    def run(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The same, not as an operator. Raises GroupError without token counts, TokensError if they are not x's."""
        group, own = self.group, len(x_TH)
        counts = _counts(group, self.layer_name)
        if own != counts[group.rank]:
            raise TokensError(
                f"{self.layer_name}, rank {group.rank}: x has {own} tokens, the engine said {counts[group.rank]}"
            )
        dealt = deal(own, group.size, counts, None)
        _log.debug("%s rank %d of %d: tokens %s", self.layer_name, group.rank, group.size, counts)
        if dealt.total == 0:
            return torch.empty_like(x_TH)
        collectives = kernels_for(x_TH.device).collectives(group.device)
        reduce_dtype = self.reduce_dtype or reduce_dtype_for(collectives, group.size, x_TH.dtype)
        if self._travel is None:  # only now are the weights in the form that the kernels want
            self._travel = travel_of(self.gate_up_proj, x_TH.dtype)
        gathered = collectives.gather(self._travel.pack(pad(x_TH, dealt.rows)))
        h = self.act_fn(self._travel.multiply(dealt.drop_padding(gathered)))
        partial, _ = self.down_proj(h)
        y_TH = collectives.reduce_scatter(dealt.restore_padding(partial.to(reduce_dtype)))
        return y_TH[:own].to(x_TH.dtype)


def split(mlp: DeepseekV2MLP, group: Group, reduce_dtype: torch.dtype | None) -> SplitMLP:
    """Turn an MLP that was built with one rank's sizes into one that runs over the group. It stays the same object.

    The engine takes its linears for whole ones, and would cut whatever it loads into them to the first rank's part:
    their parameters refuse that.
    """
    mlp.__class__ = SplitMLP
    mlp.layer_name = mlp.gate_up_proj.prefix.removesuffix(".gate_up_proj")
    mlp.group, mlp.reduce_dtype, mlp._travel = group, reduce_dtype, None
    for parameter in mlp.parameters():
        parameter.weight_loader = _refuse_to_load
    record_metadata_for_reloading(mlp)  # what the engine makes the parameters of again, before it reloads them
    return mlp


def _refuse_to_load(param: torch.Tensor, loaded_weight: torch.Tensor, *place: object) -> None:
    raise UsageError(
        f"a dense layer's weight {list(loaded_weight.shape)} was sent to a rank that holds a part of it: "
        "denseffn_shards fills that from the shards, once, at start; start the engine again"
    )


def _counts(group: Group, layer_name: str) -> list[int]:
    """Each rank's tokens, of the group's ranks."""
    metadata = get_forward_context().dp_metadata
    if metadata is None:
        raise GroupError(
            f"{layer_name}: the engine gave no token counts of the data-parallel ranks; the layer is split over "
            f"{group.size} of them and cannot run without (is data_parallel_size above 1 on every rank?)"
        )
    return metadata.num_tokens_across_dp_cpu[group.first : group.first + group.size].tolist()


def _denseffn_split(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[layer_name].run(x)


def _denseffn_split_fake(x: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="denseffn_split", op_func=_denseffn_split, fake_impl=_denseffn_split_fake)
