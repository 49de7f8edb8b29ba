"""DenseFFN: a dense layer split over the ranks of a group.

    x_TH  own tokens                     [T, H]
      quantize, all_gather               [R*P, H] or, W8A8, [R*P, H + 4] bytes
      gate_up, this rank's rows          [R*P, 2L]
      act(gate) * up                     [R*P, L]
      down, this rank's columns          [R*P, H], a partial sum
      reduce_scatter                     [P, H]
    y_TH  own tokens                     [T, H]

Shapes: T this rank's tokens, P rows that every rank brings (the largest T, or max_tokens), R tp_size, H hidden_size,
L the rank's share of intermediate_size. Column- then row-parallel, after Megatron-LM (arXiv:1909.08053, section 3).
"""

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch

from reshard.errors import TokensError, UsageError
from reshard_runtime.collectives import reduce_dtype_for
from reshard_runtime.group import agreement, check_place
from reshard_runtime.kernels import Kernels
from reshard_runtime.linear import Mix
from reshard_runtime.partial import PartialFFN
from reshard_runtime.shard import LayerShard
from reshard_runtime.tokens import checked, pad, token_layout

Deal = Literal["scattered", "replicated"]
REDUCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DenseFFN(PartialFFN):
    """y = down(act(gate(x)) * up(x)), each rank with 1/R of the three matrices; act is the shard set's own.

    Args:
        layer: this rank's part, `load_shard(...).layer(i)`.
        group: the ranks that share the layer; rank r of it holds shard r. Held weakly. None where tp_size is 1.
        tokens: "scattered" - every rank brings its own tokens and gets theirs back (data parallelism); "replicated" -
            all ranks bring the same tokens and all get the result (tensor parallelism): no gather, all_reduce.
        max_tokens: fixes the buffers for graph capture: every call issues the same collectives with the same sizes,
            whatever the counts, and computes R * max_tokens rows.
        reduce_dtype: the type in which partial sums travel. None: the tokens' own, but float32 for more than 8 ranks
            whose collective adds in the type that travels (nccl, hccl; gloo's are added here, in float32).
        dtype: the type of the tokens and of the result. None: the unquantized weights' own, else BF16.
        mix: which of W8A8_MIX's two sets is run.
        kernels: the backend; None: the one of the device that the shard is on.
        check_counts: compare the ranks' counts of tokens before each call, in a small collective which the host awaits:
            to find a fault on CUDA or NPU, not to serve, nor in a graph. On the CPU they travel with the tokens and are
            always compared.

    Making one is collective: the ranks compare what they were given, and an error on one is raised on all.

    Raises GroupError (another tp_size, tp_rank, shard set, layer or option than the group's others), ShardError
    (an activation that is not known; tensors that the scheme does not have, or too large for the device's kernels),
    UsageError (options).
    """

    def __init__(
        self,
        layer: LayerShard,
        group: torch.distributed.ProcessGroup | None = None,
        *,
        tokens: Deal = "scattered",
        max_tokens: int | None = None,
        reduce_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        mix: Mix = "dynamic",
        kernels: Kernels | None = None,
        check_counts: bool = False,
    ) -> None:
        with agreement(group) as own:
            own |= {"layer": layer.index, "shard set": layer.set_digest, "tokens": tokens, "max_tokens": max_tokens}
            own |= {"reduce_dtype": reduce_dtype, "dtype": dtype, "mix": mix, "check_counts": check_counts}
            check_place(layer, group)
            _check_options(tokens, max_tokens, reduce_dtype)
            super().__init__(layer, kernels, dtype, mix)
        self.index, self.tp_rank, self.tp_size = layer.index, layer.tp_rank, layer.tp_size
        self.max_tokens = max_tokens
        self._replicated = tokens == "replicated"
        self._collectives = None if group is None or self.tp_size == 1 else self.kernels.collectives(group)
        self._compares = self._collectives is not None and self._collectives.compares
        self._compares_first = check_counts and not self._compares
        self.reduce_dtype = reduce_dtype or reduce_dtype_for(self._collectives, self.tp_size, self.dtype)

    @torch.no_grad()
    def forward(self, x_TH: torch.Tensor, tokens_per_rank: Sequence[int] | None = None) -> torch.Tensor:
        """[..., H] -> [..., H], any leading shape; T is their product.

        tokens_per_rank: every rank's T, the same list on every rank; zeros are allowed. None: T is the same on every
        rank, or max_tokens fixes the rows. With all at zero no token travels, unless max_tokens is set.

        A token with NaN or an infinity gives no finite value (on an NPU with static W8A8: what its kernels make of it).
        No call waits for the device, and no size depends on values. There is no gradient: collectives have none.

        Raises TokensError. On all ranks where their counts differ, before a row is computed: on the CPU, or with
        check_counts; elsewhere nothing notices, and rows are wrong or a collective does not end. On this rank alone,
        after the collectives, where only its x_TH or list does not fit (size, type, device, more tokens than it said):
        it takes part with zeros, so that the others get right results and none is left waiting.
        """
        shape = x_TH.shape
        own = shape[:-1].numel()
        problem, counts = self._counts(tokens_per_rank)
        problem = problem or self._problem(x_TH, own, counts)
        layout = token_layout(own, self.tp_size, counts, self.max_tokens)
        if problem is not None:
            if self._collectives is None:
                raise problem
            x_TH = torch.zeros(layout.rows, self.hidden_size, dtype=self.dtype, device=self.device)
        x_TH = x_TH.reshape(-1, self.hidden_size)
        if self._compares_first or (self._compares and layout.total == 0):
            self._compare(layout.counts)
        if layout.total == 0:
            y_TH = x_TH
        elif self._collectives is None:
            y_TH = self.forward_local(x_TH, self.dtype)
        elif self._replicated:
            partial = self.forward_local(pad(x_TH, layout.rows), self.reduce_dtype)
            y_TH = self._collectives.all_reduce(partial, layout.counts)
        else:
            gathered = self._collectives.gather(self.pack(pad(x_TH, layout.rows)), counts=layout.counts)
            partial = self.forward_packed(layout.drop_padding(gathered), self.reduce_dtype)
            y_TH = self._collectives.reduce_scatter(layout.restore_padding(partial))
        if problem is not None:
            raise problem
        return self.keep_not_finite(y_TH[:own].to(self.dtype), x_TH).reshape(shape)

    def _counts(self, tokens_per_rank: Sequence[int] | None) -> tuple[TokensError | None, tuple[int, ...] | None]:
        """The counts that this rank was given; what is wrong with them where it can take part all the same."""
        if tokens_per_rank is None:
            return None, None
        try:
            if self._replicated:
                raise TokensError("tokens_per_rank is for scattered tokens; replicated ones are the same on every rank")
            return None, checked(tokens_per_rank, self.tp_size, self.max_tokens)
        except TokensError as error:
            if self.max_tokens is not None:
                return error, None
            if self._compares or self._compares_first:  # it does not know what to bring, and the others are waiting
                with contextlib.suppress(TokensError):
                    self._compare([-1] * self.tp_size)
            raise

    def _compare(self, counts: Sequence[int]) -> None:
        if self._collectives is not None:
            self._collectives.compare(counts, self.device)

    def _problem(self, x_TH: torch.Tensor, own: int, counts: Sequence[int] | None) -> TokensError | None:
        """What is wrong with this rank's `own` tokens, if anything."""
        if x_TH.dim() == 0 or x_TH.shape[-1] != self.hidden_size:
            wrong = f"is {list(x_TH.shape)}, its last dim must be hidden_size {self.hidden_size}"
        elif x_TH.dtype != self.dtype:
            wrong = f"is {x_TH.dtype}, the layer was made for {self.dtype}"
        elif x_TH.device != self.device:
            wrong = f"is on {x_TH.device}, the layer on {self.device}"
        elif counts is not None and own != counts[self.tp_rank]:
            wrong = f"has {own} tokens, tokens_per_rank[{self.tp_rank}] is {counts[self.tp_rank]}"
        elif self.max_tokens is not None and own > self.max_tokens:
            wrong = f"has {own} tokens, the buffers are fixed for max_tokens={self.max_tokens}"
        else:
            return None
        return TokensError(f"layer {self.index}, rank {self.tp_rank}: x {wrong}")

    def extra_repr(self) -> str:
        """What the repr says."""
        place = f"layer {self.index}, rank {self.tp_rank} of {self.tp_size}"
        return f"{place}, {self.activation}, {self.kernels.name}, {self.dtype}"


def _check_options(tokens: str, max_tokens: int | None, reduce_dtype: torch.dtype | None) -> None:
    if tokens not in ("scattered", "replicated"):
        raise UsageError(f"tokens is {tokens!r}; it may be 'scattered' or 'replicated'")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; it must be at least 1")
    if reduce_dtype is not None and reduce_dtype not in REDUCE_DTYPES:
        raise UsageError(f"reduce_dtype is {reduce_dtype}; it may be {', '.join(map(str, REDUCE_DTYPES))}")
