"""The split layer on real gloo processes: what comes out for every scheme and every dealing, and what travels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from reshard.errors import ReshardError
from reshard.model.activation import Activation
from reshard.plan.pipeline import Cut
from reshard_runtime import DenseFFN, load_shard
from reshard_runtime.collectives import PairwiseCollectives
from reshard_runtime.kernels.base import Gated
from reshard_runtime.kernels.cpu import CpuKernels
from tests.support.builders import RECIPES, Spec, build
from tests.support.distributed import Ranks
from tests.support.running import split
from tests.support.unsplit import CountingKernels, plain, whole_layer

HIDDEN, INTERMEDIATE = 256, 1024
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "modelslim_fp16_static": torch.float16}
# Partial sums are rounded to the tokens' type and added: as many roundings again as the unsplit result has.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-20}
# Of W8A8 dynamic, h is quantized over each rank's columns: other steps, of max/127, than the unsplit layer's.
STEPS = 0.03

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A shard set of a small model that runs."""

    def cut(recipe: str, size: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, **rest: Any) -> Path:
        build(tmp_path / "model", Spec(recipe, hidden, intermediate, dense=1, computable=True, **rest))
        split(tmp_path / "model", tmp_path / "shards", Cut(size))
        return tmp_path / "shards"

    return cut


def _tokens(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _whole(shards: Path, dtype: torch.dtype, mix: Any = "dynamic") -> DenseFFN:
    return DenseFFN(whole_layer(shards.parent / "model"), dtype=dtype, mix=mix)


def _layer(group: dist.ProcessGroup, shards: Path, **options: Any) -> DenseFFN:
    return DenseFFN(load_shard(shards, group.rank()).layer(0), group, **options)


def _dealt(
    group: dist.ProcessGroup, shards: Path, counts: list[int], dtype: torch.dtype, options: dict[str, Any], listed: bool
) -> torch.Tensor:
    rank = group.rank()
    x_TH = _tokens((counts[rank], HIDDEN), rank, dtype)
    return _layer(group, shards, dtype=dtype, **options)(x_TH, tokens_per_rank=counts if listed else None)


def _off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_scheme_with_uneven_tokens(ranks: Callable[[int], Ranks], make: Make, recipe: str, size: int) -> None:
    shards, dtype = make(recipe, size), DTYPES.get(recipe, torch.bfloat16)
    for mix in ("dynamic", "static") if recipe == "modelslim_mix" else ("dynamic",):
        counts = [5, 1, 0, 7][:size]
        outputs = ranks(size).run(_dealt, shards, counts, dtype, {"mix": mix}, True)
        whole = _whole(shards, dtype, mix)
        is_dynamic = type(whole.down_proj).__name__ == "DynamicLinear"
        for rank, count in enumerate(counts):
            wanted = whole(_tokens((count, HIDDEN), rank, dtype))
            assert _off(outputs[rank], wanted) < (STEPS if is_dynamic else 2 * ROUNDING[dtype])


def test_a_plain_down_below_quantized_gate_and_up(ranks: Callable[[int], Ranks], make: Make) -> None:
    shards = make("modelslim_dynamic", 2, down_recipe="modelslim_float")
    whole = _whole(shards, torch.bfloat16)
    for rank, y_TH in enumerate(ranks(2).run(_dealt, shards, [3, 4], torch.bfloat16, {}, True)):
        assert _off(y_TH, whole(_tokens(([3, 4][rank], HIDDEN), rank))) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize(
    ("counts", "listed"),
    [([4, 4, 4, 4], False), ([1, 1, 1, 1], False), ([1, 0, 0, 0], True), ([0, 0, 0, 0], True), ([0, 0, 0, 0], False),
     ([2048, 2048, 2048, 2048], False), ([8192, 0, 1, 3], True)],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["fp32", "modelslim_dynamic"])
def test_every_dealing(ranks: Callable[[int], Ranks], make: Make, recipe: str, counts: list[int], listed: bool) -> None:
    shards, dtype = make(recipe, 4, intermediate=256), DTYPES.get(recipe, torch.bfloat16)
    whole = _whole(shards, dtype)
    for rank, y_TH in enumerate(ranks(4).run(_dealt, shards, counts, dtype, {}, listed)):
        wanted = whole(_tokens((counts[rank], HIDDEN), rank, dtype))
        assert _off(y_TH, wanted) < (ROUNDING[dtype] if recipe == "fp32" else STEPS)


def _shapes(group: dist.ProcessGroup, shards: Path) -> list[torch.Tensor]:
    ffn = _layer(group, shards)
    return [ffn(_tokens((*leading, HIDDEN), 0)) for leading in ((), (6,), (2, 3), (1, 2, 1, 3), (0,), (2, 0))]


def test_any_leading_shape(ranks: Callable[[int], Ranks], make: Make) -> None:
    for one, six, two, four, none, nothing in ranks(2).run(_shapes, make("bf16", 2)):
        assert one.shape == (HIDDEN,)
        assert (two.shape, four.shape) == ((2, 3, HIDDEN), (1, 2, 1, 3, HIDDEN))
        assert torch.equal(two.reshape(6, HIDDEN), six)
        assert torch.equal(four.reshape(6, HIDDEN), six)
        assert (none.shape, nothing.shape) == ((0, HIDDEN), (2, 0, HIDDEN))


def _bf16_first(group: dist.ProcessGroup, shards: Path) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """The layer as it is, and the same with BF16 gathered and quantized afterwards; bytes that were given to gather."""
    kernels = CountingKernels()
    ffn = _layer(group, shards, kernels=kernels)
    x_TH = _tokens((9, ffn.hidden_size), group.rank())
    y_TH = ffn(x_TH)
    plain = PairwiseCollectives(group)
    after = plain.reduce_scatter(ffn.forward_local(plain.gather(x_TH), ffn.reduce_dtype)).to(ffn.dtype)
    name, shape, nbytes = kernels.calls[0]
    assert (name, shape) == ("gather", (9, ffn.hidden_size + 4))
    return y_TH, after, nbytes, x_TH.nbytes


@pytest.mark.parametrize("recipe", ["modelslim_dynamic", "ct_dynamic"])
@pytest.mark.parametrize("size", [2, 4])
def test_quantizing_before_the_gather_is_the_same_bits_for_half_the_bytes(
    ranks: Callable[[int], Ranks], make: Make, recipe: str, size: int
) -> None:
    for y_TH, after, nbytes, unpacked in ranks(size).run(_bf16_first, make(recipe, size, 7168, 256)):
        assert torch.equal(y_TH, after)
        assert (nbytes, unpacked) == (9 * 7172, 9 * 7168 * 2)
        assert nbytes <= 0.51 * unpacked


def _integers(linear: Any, x_TK: np.ndarray) -> np.ndarray:
    """A static linear in plain integers: [T, N] float32."""
    t = {
        suffix: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        for suffix, value in linear.items()
    }
    scale = np.float32(1) / t["input_scale"].astype(np.float32)
    q_TK = np.clip(np.rint(x_TK * scale + t["input_offset"].astype(np.float32)), -128, 127).astype(np.int64)
    sums = q_TK @ t["weight"].astype(np.int64).T + t["quant_bias"]
    return sums.astype(np.float32) * t["deq_scale"]


def _swiglu(h_T2L: np.ndarray) -> torch.Tensor:
    gate, up = torch.from_numpy(h_T2L).bfloat16().float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_static_is_bit_for_bit_a_plain_integer_reference(ranks: Callable[[int], Ranks], make: Make, size: int) -> None:
    """Partial sums in float32, added by rank: quant_bias counts once, as rank 0 alone holds it."""
    shards = make("modelslim_static", size)
    x_TH = torch.cat([_tokens((3, HIDDEN), rank) for rank in range(size)])
    total = np.zeros((3 * size, HIDDEN), np.float32)
    for rank in range(size):
        layer = load_shard(shards, rank).layer(0)
        assert bool(layer.down.tensors["quant_bias"].any()) == (rank == 0)
        h_TL = _swiglu(_integers(layer.gate_up.tensors, x_TH.float().numpy()))
        total += _integers(layer.down.tensors, h_TL.float().numpy())
    if size == 1:
        outputs = [DenseFFN(load_shard(shards, 0).layer(0))(x_TH)]
    else:
        outputs = ranks(size).run(_dealt, shards, [3] * size, torch.bfloat16, {"reduce_dtype": torch.float32}, False)
    assert torch.equal(torch.cat(outputs), torch.from_numpy(total).bfloat16())


@pytest.mark.parametrize("options", [{}, {"max_tokens": 9}], ids=str)
@pytest.mark.parametrize("recipe", ["fp32", "modelslim_static"])
def test_replicated_tokens(ranks: Callable[[int], Ranks], make: Make, recipe: str, options: dict[str, Any]) -> None:
    shards, dtype = make(recipe, 4), DTYPES.get(recipe, torch.bfloat16)
    outputs = ranks(4).run(_same_tokens, shards, dtype, {"tokens": "replicated", **options})
    assert all(torch.equal(y_TH, outputs[0]) for y_TH in outputs)
    assert _off(outputs[0], _whole(shards, dtype)(_tokens((7, HIDDEN), 5, dtype))) < 2 * ROUNDING[dtype]


def _same_tokens(group: dist.ProcessGroup, shards: Path, dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    ffn = _layer(group, shards, dtype=dtype, **options)
    with pytest.raises(ReshardError, match="tokens_per_rank is for scattered tokens"):
        ffn(_tokens((7, HIDDEN), 5, dtype), tokens_per_rank=[7] * group.size())
    return ffn(_tokens((7, HIDDEN), 5, dtype))


def _buffers(group: dist.ProcessGroup, shards: Path, dealings: list[list[int]]) -> tuple[list[Any], list[torch.Tensor]]:
    kernels = CountingKernels()
    ffn = _layer(group, shards, kernels=kernels, max_tokens=8)
    rank, outputs, calls = group.rank(), [], []
    for number, counts in enumerate(dealings):
        kernels.calls.clear()
        x_TH = _tokens((counts[rank], HIDDEN), rank)
        outputs.append(ffn(x_TH, tokens_per_rank=counts if number % 2 else None))
        calls.append(list(kernels.calls))
    return calls, outputs


@pytest.mark.parametrize("recipe", ["bf16", "modelslim_dynamic"])
def test_fixed_buffers_always_send_the_same(ranks: Callable[[int], Ranks], make: Make, recipe: str) -> None:
    """With other counts on every rank, said or not: as in ranks that replay graphs of different buckets."""
    shards = make(recipe, 4)
    dealings = [[8, 1, 0, 3], [8, 1, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0], [8, 8, 8, 8], [2, 2, 2, 2]]
    width, own = (HIDDEN + 4, 1) if recipe == "modelslim_dynamic" else (HIDDEN, 2)
    wanted = [("gather", (8, width), 8 * width * own), ("reduce_scatter", (32, HIDDEN), 32 * HIDDEN * 2)]
    whole = _whole(shards, torch.bfloat16)
    for rank, (calls, outputs) in enumerate(ranks(4).run(_buffers, shards, dealings)):
        assert calls == [wanted] * len(dealings)
        for counts, y_TH in zip(dealings, outputs, strict=True):
            assert _off(y_TH, whole(_tokens((counts[rank], HIDDEN), rank))) < STEPS
        assert torch.equal(outputs[0], outputs[1])


def _moved(group: dist.ProcessGroup, shards: Path) -> tuple[bool, torch.Tensor, dict[str, torch.dtype]]:
    parent = torch.nn.Sequential(_layer(group, shards))
    before = {name: plain(value) for name, value in parent.state_dict().items()}
    parent.half().float().to(torch.float64)
    after = {name: plain(value) for name, value in parent.state_dict().items()}
    same = all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    with torch.enable_grad():
        y_TH = parent(_tokens((2, HIDDEN), 0).requires_grad_())
    return same, y_TH, {name: value.dtype for name, value in after.items()}


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [("bf16", {"weight": torch.bfloat16}), ("ct_dynamic", {"weight": torch.int8, "weight_scale": torch.float32})],
)
def test_a_model_s_to_changes_nothing(
    ranks: Callable[[int], Ranks], make: Make, recipe: str, wanted: dict[str, torch.dtype]
) -> None:
    for same, y_TH, dtypes in ranks(2).run(_moved, make(recipe, 2)):
        assert same
        assert not y_TH.requires_grad
        assert dtypes == {f"0.{module}.{s}": t for module in ("gate_up_proj", "down_proj") for s, t in wanted.items()}


class _OverflowingKernels(CpuKernels):
    """The second token's values overflow between the matrices."""

    def gated(self, activation: Activation) -> Gated:
        run = super().gated(activation)
        return lambda h_T2L: run(h_T2L).index_fill_(0, torch.tensor([1]), torch.inf)


def _poisoned(
    group: dist.ProcessGroup, shards: Path, dtype: torch.dtype, value: float | None, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(without, with) a value that is not finite in the second of the tokens, or between the matrices."""
    x_TH = _tokens((4, HIDDEN), 0 if "tokens" in options else group.rank(), dtype)
    before = _layer(group, shards, dtype=dtype, **options)(x_TH)
    if value is None:
        return before, _layer(group, shards, dtype=dtype, kernels=_OverflowingKernels(), **options)(x_TH)
    if group.rank() == 0 or "tokens" in options:
        x_TH[1, 7] = value
    return before, _layer(group, shards, dtype=dtype, **options)(x_TH)


NOT_FINITE: list[tuple[str, float | None, dict[str, Any]]] = [
    *((recipe, torch.nan, {}) for recipe in ("bf16", "modelslim_dynamic", "modelslim_fp16_static", "ct_static")),
    *(("modelslim_static", value, {}) for value in (torch.nan, torch.inf, -torch.inf, None)),
    ("modelslim_static", torch.nan, {"tokens": "replicated"}),
    ("modelslim_static", torch.nan, {"max_tokens": 6}),
    ("modelslim_mix", torch.nan, {"mix": "static"}),
]


@pytest.mark.parametrize(("recipe", "value", "options"), NOT_FINITE)
def test_a_token_that_is_not_finite_gives_nothing_finite(
    ranks: Callable[[int], Ranks], make: Make, recipe: str, value: float | None, options: dict[str, Any]
) -> None:
    """On the rank that brought it; the others' and its other tokens' results are as without."""
    found = ranks(2).run(_poisoned, make(recipe, 2), DTYPES.get(recipe, torch.bfloat16), value, options)
    for rank, (before, after) in enumerate(found):
        assert before.isfinite().all()
        is_poisoned = rank == 0 or "tokens" in options
        others = [0, 2, 3] if is_poisoned else [0, 1, 2, 3]
        assert torch.equal(after[others], before[others])
        assert not (is_poisoned and after[1].isfinite().any())
