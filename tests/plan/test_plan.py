"""The cut's arithmetic, on checkpoints of arbitrary sizes: shapes only, no bytes are read or written.

The expectation is docs/formats.md's table written out again, by hand. Every source element gets a number of its own;
a rank's tensor is then an array of such numbers (0: no element), and what the plan's slices give must be that array.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reshard.errors import AlignmentError
from reshard.plan.plan import Plan, PlannedShard, make_plan
from tests.plan.shapes import checkpoint_of, grid_of, recipe_of, shapes_of, share_of
from tests.support.builders import RECIPES, Spec
from tests.support.cut_by_hand import BLOCK, GROUP, ITEMSIZE

MODELSLIM = [name for name, recipe in RECIPES.items() if recipe.description]
UNQUANTIZED = ["bf16", "fp16", "fp32"]

Ids = np.ndarray[Any, np.dtype[np.int64]]


# --- checkpoints of any size, without bytes ---


def excepting(recipe: str, key: str, roles: list[str]) -> dict[str, Any]:
    """A config that leaves some roles unquantized."""
    quantization = dict(RECIPES[recipe].quantization_config or {})
    quantization[key] = [f"model.layers.{layer}.mlp.{role}" for layer in range(4) for role in roles]
    return {"quantization_config": quantization}


KEYS = {"fp8": "modules_to_not_convert", "blockwise_int8": "ignored_layers", "compressed-tensors": "ignore"}


@st.composite
def specs(draw: st.DrawFn, intermediate: int | None = None) -> Spec:
    """Any recipe, alone or with down unquantized (or quantized in another way), or with only down quantized."""
    recipe = draw(st.sampled_from(list(RECIPES)))
    down: str | None = None
    config: dict[str, Any] = {}
    mixing = draw(st.sampled_from(["alone", "float down", "only down"]))
    key = KEYS.get((RECIPES[recipe].quantization_config or {}).get("quant_method", ""), "ignore")
    if recipe in MODELSLIM and mixing != "alone":
        down = draw(st.sampled_from(MODELSLIM + UNQUANTIZED))
    elif recipe not in UNQUANTIZED and mixing == "float down":
        down, config = "bf16", excepting(recipe, key, ["down_proj"])
    elif recipe not in UNQUANTIZED and mixing == "only down":
        recipe, down, config = "bf16", recipe, excepting(recipe, key, ["gate_proj", "up_proj"])
    return Spec(
        recipe,
        hidden=draw(st.integers(1, 40) | st.sampled_from([64, 128, 129, 256])),
        intermediate=intermediate or draw(st.integers(1, 40) | st.sampled_from([96, 128, 200, 256, 384, 512, 640])),
        dense=draw(st.integers(1, 3)),
        down_recipe=down,
        config=config,
    )


LAYOUT = st.sampled_from(["fused", "separate"])


# --- the table, by hand ---


def cut_of(role: str, suffix: str, rule: str) -> str:
    if rule == "1":
        return "replicated"
    if role != "down_proj":
        return "rows"
    if rule in {"out,in", "blocks", "groups"}:
        return "columns"
    return "rank 0" if suffix == "quant_bias" else "replicated"


def numbered(spec: Spec) -> dict[str, Ids]:
    """A number for every element of every source tensor, from 1."""
    found, first = {}, 1
    for name, (_, shape) in shapes_of(spec).items():
        count = int(np.prod(shape))
        found[name] = np.arange(first, first + count).reshape(shape)
        first += count
    return found


def cut_by_hand(whole: Ids, cut: str, local: int, rank: int) -> Ids:
    """What a rank holds of one tensor: zeros behind the source's end."""
    if cut == "replicated":
        return whole
    if cut == "rank 0":
        return whole if rank == 0 else np.zeros_like(whole)
    dim = 0 if cut == "rows" else 1
    held = np.take(whole, range(rank * local, min((rank + 1) * local, whole.shape[dim])), axis=dim)
    missing = [(0, 0)] * whole.ndim
    missing[dim] = (0, local - held.shape[dim])
    return np.pad(held, missing)


def expected_rank(spec: Spec, share: int, rank: int, layout: str) -> dict[str, tuple[str, Ids]]:
    """Every tensor of one rank: its type and its elements."""
    ids, found = numbered(spec), {}
    stacked = (
        {"gate_up_proj": ["gate_proj", "up_proj"]}
        if layout == "fused"
        else {"gate_proj": ["gate_proj"], "up_proj": ["up_proj"]}
    )
    for layer in range(spec.dense):
        prefix = f"model.layers.{layer}.mlp"
        for name, roles in {**stacked, "down_proj": ["down_proj"]}.items():
            for suffix, (dtype, rule) in RECIPES[recipe_of(spec, roles[0])].tensors.items():
                cut = cut_of(roles[0], suffix, rule)
                unit = {"blocks": BLOCK, "groups": GROUP if cut == "columns" else 1}.get(rule, 1)
                local = -(-share // unit)
                pieces = [cut_by_hand(ids[f"{prefix}.{role}.{suffix}"], cut, local, rank) for role in roles]
                whole = pieces[0] if cut == "replicated" else np.concatenate(pieces)
                found[f"{prefix}.{name}.{suffix}"] = (dtype, whole)
    return found


def planned_rank(spec: Spec, shard: PlannedShard) -> dict[str, tuple[str, Ids]]:
    """The same from the plan's slices, no position written twice."""
    ids, found = numbered(spec), {}
    for tensor in shard.tensors:
        local = np.zeros(tensor.shape, np.int64)
        for piece in tensor.slices:
            assert piece.shape == ids[piece.tensor].shape
            held = np.take(ids[piece.tensor], range(piece.start, piece.stop), axis=piece.dim)
            where = [slice(None)] * local.ndim
            where[piece.dim] = slice(piece.at, piece.at + piece.stop - piece.start)
            assert not local[tuple(where)].any(), f"{tensor.name}: two slices at {piece.at}"
            local[tuple(where)] = held
        found[tensor.name] = (tensor.dtype, local)
    return found


def plan_or_refusal(spec: Spec, tp: int, layout: str, pad: bool) -> Plan | None:
    """The plan, or None where it must be, and is, refused."""
    if share_of(spec, tp, layout, pad) is not None:
        return make_plan(checkpoint_of(spec), tp, layout, pad)
    with pytest.raises(AlignmentError):
        make_plan(checkpoint_of(spec), tp, layout, pad)
    return None


# --- properties ---


@settings(deadline=None, max_examples=100)
@given(specs(), st.integers(1, 9), LAYOUT, st.booleans())
@example(Spec("fp8_block", hidden=200, intermediate=300), 1, "separate", False)  # off the grid, and yet whole
@example(Spec("fp8_block", hidden=200, intermediate=300), 8, "fused", True)  # ranks of nothing but padding
@example(Spec("modelslim_v0_static", hidden=40, intermediate=96), 4, "fused", False)
def test_each_rank_holds_what_the_table_says(spec: Spec, tp: int, layout: str, pad: bool) -> None:
    plan = plan_or_refusal(spec, tp, layout, pad)
    if plan is None:
        return
    share = share_of(spec, tp, layout, pad)
    assert share is not None
    assert [shard.tp_rank for shard in plan.shards] == list(range(tp))
    for rank, shard in enumerate(plan.shards):
        assert shard.file == f"denseffn-rank-{rank:05d}-of-{tp:05d}.safetensors"
        wanted, got = expected_rank(spec, share, rank, layout), planned_rank(spec, shard)
        assert got.keys() == wanted.keys()
        for name, (dtype, elements) in wanted.items():
            assert got[name][0] == dtype, name
            assert got[name][1].shape == elements.shape, name
            assert np.array_equal(got[name][1], elements), name


@settings(deadline=None, max_examples=100)
@given(specs(), st.integers(1, 9), LAYOUT, st.booleans())
def test_every_element_lands_once_or_once_per_rank(spec: Spec, tp: int, layout: str, pad: bool) -> None:
    plan = plan_or_refusal(spec, tp, layout, pad)
    if plan is None:
        return
    ids = numbered(spec)
    total = sum(part.size for part in ids.values())
    held = [
        np.bincount(np.concatenate([e.ravel() for _, e in planned_rank(spec, shard).values()]), minlength=total + 1)
        for shard in plan.shards
    ]
    shared = {name for shard in plan.shards for tensor in shard.tensors for name in tensor.same_as}
    for name, numbers in ids.items():
        _, _, _, _, role, suffix = name.split(".")
        cut = cut_of(role, suffix, RECIPES[recipe_of(spec, role)].tensors[suffix][1])
        counts = np.array([count[numbers.ravel()] for count in held])  # [rank, element]
        if cut == "replicated":
            # In the fused layout up's copy is gate's: the two are checked to be equal before anything is written.
            alike = layout == "fused" and role == "up_proj"
            assert (name in shared) == alike
            assert (counts == (0 if alike else 1)).all(), name
        elif cut == "rank 0":
            assert (counts[0] == 1).all(), name
            assert not counts[1:].any(), name
        else:
            assert (counts.sum(axis=0) == 1).all(), name
            assert name not in shared


def tensors_in_file(header: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The header's entries in their order, read as any other tool reads them."""
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length
    entries = json.loads(header[8:])
    del entries["__metadata__"]
    yield from entries.items()


@settings(deadline=None, max_examples=100)
@given(specs(), st.integers(1, 9), LAYOUT, st.booleans())
def test_file_order_and_alignment(spec: Spec, tp: int, layout: str, pad: bool) -> None:
    plan = plan_or_refusal(spec, tp, layout, pad)
    for shard in plan.shards if plan else ():
        data = len(shard.header)
        assert data % 4096 == 0
        entries = list(tensors_in_file(shard.header))
        assert [name for name, _ in entries] == [tensor.name for tensor in shard.tensors]
        at, seen_other = 0, False
        pages: list[int] = []
        for (name, entry), tensor in zip(entries, shard.tensors, strict=True):
            start, stop = entry["data_offsets"]
            size = int(np.prod(entry["shape"])) * ITEMSIZE[entry["dtype"]]
            assert (start, stop) == (at, at + size), f"{name}: a hole or an overlap"
            assert tensor.nbytes == size
            assert (tensor.dtype, tensor.shape) == (entry["dtype"], tuple(entry["shape"]))
            assert (data + start) % ITEMSIZE[entry["dtype"]] == 0, name
            if size % 4096 == 0:
                assert not seen_other, f"{name}: whole pages behind {pages}"
                assert (data + start) % 4096 == 0
                pages.append(size)
            else:
                seen_other = True
            at = stop
        assert pages == sorted(pages, reverse=True)
        assert shard.size == data + at
    assert plan is None or plan.nbytes == sum(shard.size for shard in plan.shards)


@settings(deadline=None, max_examples=60)
@given(st.data(), specs(), st.integers(1, 6), LAYOUT)
def test_the_plan_does_not_depend_on_the_order_of_files(data: st.DataObject, spec: Spec, tp: int, layout: str) -> None:
    spec = replace(spec, intermediate=spec.intermediate * tp)
    order = data.draw(st.permutations(list(shapes_of(spec))))
    assert make_plan(checkpoint_of(spec), tp, layout, True) == make_plan(checkpoint_of(spec, order), tp, layout, True)


@settings(deadline=None, max_examples=60)
@given(specs(), st.integers(1, 9), LAYOUT)
def test_padding_is_recorded_where_there_is_some(spec: Spec, tp: int, layout: str) -> None:
    plan = plan_or_refusal(spec, tp, layout, True)
    share = share_of(spec, tp, layout, True)
    if plan is None or share is None:
        return
    if share * tp == spec.intermediate:
        assert plan.padding is None
    else:
        assert plan.padding is not None
        assert plan.padding.padded == share * tp
        assert plan.padding.multiple == grid_of(spec)
