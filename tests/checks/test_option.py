"""denseffn_tensor_parallel_size: each rule has one message, and none advises what another forbids."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.checks.serving_option import OPTION, broken_rules, option_of
from reshard.checks.setup import Setup


def _messages(value: object, setup: Setup, shards: int | None = None, **more: object) -> list[str]:
    return [rule.message for rule in broken_rules({OPTION: value, **more}, setup, shards)]


@pytest.mark.parametrize("value", [1, 2, 4, 8, 16])
def test_what_divides_the_data_parallel_size_is_right(value: int) -> None:
    assert not broken_rules({OPTION: value}, Setup(16, 1, moe=True), value)
    assert option_of({OPTION: value}) == value


def test_absent_is_off() -> None:
    assert not broken_rules({}, Setup(16, 4, moe=False), 4)
    assert option_of({}) is None


@pytest.mark.parametrize("value", [0, -1, 3, 32, True, "8", 8.0, [8]])
def test_another_size(value: object) -> None:
    assert _messages(value, Setup(16, 1, moe=True)) == [
        f"denseffn_tensor_parallel_size is {value!r}; with data-parallel size 16 it may be 1, 2, 4, 8 or 16"
    ]


def test_without_data_parallel_ranks() -> None:
    assert _messages(8, Setup(1, 1, moe=True)) == [
        "denseffn_tensor_parallel_size is 8; with data-parallel size 1 it may be 1"
    ]


@pytest.mark.parametrize("value", [4, 8, 16, 32, 64])
def test_beside_tensor_parallelism_it_counts_the_ranks_of_both(value: int) -> None:
    assert not broken_rules({OPTION: value}, Setup(16, 4, moe=True), value)


@pytest.mark.parametrize("value", [1, 2, 3, 12, 128, "4"])
def test_another_size_beside_tensor_parallelism(value: object) -> None:
    assert _messages(value, Setup(16, 4, moe=True), 8) == [
        f"denseffn_tensor_parallel_size is {value!r}; with data-parallel size 16 and tensor-parallel size 4 it may be "
        "4, 8, 16, 32 or 64"
    ]


def test_a_model_without_experts() -> None:
    """What a rank of such a model is told of its data-parallel size is 1: nothing is said of that."""
    for data in (16, 1):
        (message,) = _messages(8, Setup(data, 1, moe=False), 8)
        assert message.startswith("denseffn_tensor_parallel_size is 8, and the model has no MoE layers")
        assert message.endswith("; use tensor parallelism for it")
        (message,) = _messages(8, Setup(data, 4, moe=False), 8)
        assert message.startswith("denseffn_tensor_parallel_size is 8, and the model has no MoE layers")
        assert message.endswith("; leave it out: the model's tensor-parallel ranks share the layers without it")
        assert _messages(1, Setup(data, 4, moe=False), 8) == [
            "denseffn_tensor_parallel_size is 1; with no MoE layers and tensor-parallel size 4 it may be 4"
        ]
        assert _messages(True, Setup(data, 1, moe=False)) == [
            "denseffn_tensor_parallel_size is True; with no MoE layers it may be 1"
        ]


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_engine_s_own_partition_needs_no_experts(tensor: int) -> None:
    assert not broken_rules({OPTION: tensor}, Setup(16, tensor, moe=False), tensor)


def test_no_size_is_advised_that_the_layers_cannot_be_cut_for() -> None:
    def said(*can: int) -> str:
        (rule,) = broken_rules({OPTION: 3}, Setup(10, 2, moe=True), None, lambda size: size in can)
        return rule.message.removeprefix("denseffn_tensor_parallel_size is 3; with data-parallel size 10 and ")

    assert said(2, 4, 10, 20) == "tensor-parallel size 2 it may be 2, 4, 10 or 20"
    assert said(2, 4) == "tensor-parallel size 2 it may be 2 or 4 (not 10 or 20, which the layers cannot be cut for)"
    assert said(3) == "tensor-parallel size 2 it would have to be 2, 4, 10 or 20, which the layers cannot be cut for"


def test_another_set() -> None:
    assert _messages(4, Setup(16, 1, moe=True), 8) == [
        "denseffn_tensor_parallel_size is 4, the shard set is cut for 8: set it to 8, or cut it with reshard split "
        "--tp 4"
    ]


def test_another_set_whose_size_the_option_may_not_have() -> None:
    assert _messages(4, Setup(4, 1, moe=True), 8) == [
        "denseffn_tensor_parallel_size is 4, the shard set is cut for 8: cut it with reshard split --tp 4"
    ]


@pytest.mark.parametrize(("shards", "way"), [(8, "set it to 8, or "), (2, ""), (3, ""), (128, "")])
def test_another_set_beside_tensor_parallelism(shards: int, way: str) -> None:
    cut = "cut it with reshard split --tp"
    assert _messages(16, Setup(16, 4, moe=True), shards) == [
        f"denseffn_tensor_parallel_size is 16, the shard set is cut for {shards}: {way}{cut} 16"
    ]
    (unset,) = broken_rules({}, Setup(16, 4, moe=True), shards)
    assert unset.message == (
        f"denseffn_tensor_parallel_size is not set, the shard set is cut for {shards}, the engine's dense layers are "
        f"for 4: {way}{cut} 4"
    )


@pytest.mark.parametrize("key", ["denseffn_tp_size", "dense_ffn_tensor_parallel_size", "denseffn_tensor_parallel"])
def test_another_name(key: str) -> None:
    (rule,) = broken_rules({key: 8}, Setup(16, 1, moe=True))
    assert rule.message == f"{key} in the additional config is no option; denseffn_tensor_parallel_size is"


def test_others_keys_are_theirs() -> None:
    others = {"torchair_graph_config": {}, "ascend_scheduler_config": {}, "finegrained_tp_config": {"x": 1}}
    assert not broken_rules({OPTION: 8, **others}, Setup(16, 1, moe=True))


_NOT_READ = "where nothing reads it; it belongs"
_AT_TOP = f"mlp_tensor_parallel_size stands at the top of the additional config, {_NOT_READ} in finegrained_tp_config"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"mlp_tensor_parallel_size": 8},
            _AT_TOP,
        ),
        (
            {"ascend_compilation_config": {"mlp_tensor_parallel_size": 8}},
            f"mlp_tensor_parallel_size stands in ascend_compilation_config, {_NOT_READ} in finegrained_tp_config",
        ),
        (
            {"finegrained_tp_config": {OPTION: 8}},
            f"{OPTION} stands in finegrained_tp_config, {_NOT_READ} at the top of the additional config",
        ),
        (
            {"additional_config": {"more": {OPTION: 8}}},
            f"{OPTION} stands in additional_config.more, {_NOT_READ} at the top of the additional config",
        ),
        (
            {"fine_grained_tp_config": {"lmhead_tensor_parallel_size": 8}},
            "fine_grained_tp_config is no key of vllm-ascend's; finegrained_tp_config is",
        ),
        (
            {"finegrained_tp_config": {OPTION: 8}, "mlp_tensor_parallel_size": 8},
            f"{OPTION} stands in finegrained_tp_config, {_NOT_READ} at the top of the additional config; " + _AT_TOP,
        ),
    ],
    ids=str,
)
def test_a_key_in_another_place(config: dict[str, object], message: str) -> None:
    """And no advice on the shard set's size, which may be right."""
    (rule,) = broken_rules(config, Setup(16, 1, moe=True), 8)
    assert (rule.rule, rule.message) == ("place", message)


def test_a_key_in_its_place_and_in_another() -> None:
    config = {OPTION: 8, "finegrained_tp_config": {OPTION: 4}}
    assert [rule.rule for rule in broken_rules(config, Setup(16, 1, moe=True), 8)] == ["place"]


def test_two_owners_of_the_same_layers() -> None:
    (message,) = _messages(8, Setup(16, 1, moe=True), 8, finegrained_tp_config={"mlp_tensor_parallel_size": 4})
    assert message == (
        "denseffn_tensor_parallel_size is 8 and finegrained_tp_config.mlp_tensor_parallel_size 4: both cut the same "
        "layers; leave one of the two out"
    )


def _ascends(value: object) -> dict[str, object]:
    return {"finegrained_tp_config": {"mlp_tensor_parallel_size": value}}


@pytest.mark.parametrize("value", [0, -1, False])
def test_ascends_zero_is_off(value: object) -> None:
    assert not broken_rules({OPTION: 8, **_ascends(value)}, Setup(16, 1, True, 2), 8)
    assert not broken_rules(_ascends(value), Setup(16, 8, moe=True), 8)


@pytest.mark.parametrize("value", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tensor", [1, 4])
def test_ascends_own_sizes(value: int, tensor: int) -> None:
    """They count data-parallel ranks, at one tensor-parallel rank."""
    for moe in (True, None):
        assert not broken_rules(_ascends(value), Setup(16, tensor, moe), value)
    (message,) = (rule.message for rule in broken_rules(_ascends(value), Setup(16, tensor, moe=True), 32))
    assert message == (
        "denseffn_tensor_parallel_size is not set, the shard set is cut for 32, the engine's dense layers are for "
        f"{value}: cut it with reshard split --tp {value}"
    )


@pytest.mark.parametrize("value", [3, 32, "8", 8.0, True, None, [8]])
def test_another_size_of_ascends(value: object) -> None:
    (rule,) = broken_rules(_ascends(value), Setup(16, 4, moe=True), 8)
    assert (rule.rule, rule.message) == (
        "ascend",
        f"finegrained_tp_config.mlp_tensor_parallel_size is {value!r}; with data-parallel size 16 it may be 1, 2, 4, 8 "
        "or 16",
    )


def test_ascends_split_of_a_model_without_experts() -> None:
    (rule,) = broken_rules(_ascends(8), Setup(16, 1, False, 2), 8)
    assert (rule.rule, rule.message) == (
        "ascend",
        "finegrained_tp_config.mlp_tensor_parallel_size is 8, and the model has no MoE layers: vllm-ascend takes it "
        "for models that have some; leave it out",
    )


def test_ascends_split_mixes_pipeline_stages() -> None:
    for more, shards in (({}, 8), ({}, 4), ({OPTION: 8}, 8)):
        *twice, rule = broken_rules({**_ascends(8), **more}, Setup(16, 1, True, 2), shards)
        assert [one.rule for one in twice] == (["twice"] if more else [])
        assert (rule.rule, rule.message) == (
            "stages",
            "finegrained_tp_config.mlp_tensor_parallel_size is 8, pipeline-parallel size 2: vllm-ascend's groups for "
            "it mix ranks of different stages; leave it out (denseffn_tensor_parallel_size splits within a stage)",
        )
    assert not broken_rules(_ascends(1), Setup(16, 1, True, 2), 1), "a group of one mixes nothing"
    assert not broken_rules({OPTION: 8}, Setup(16, 1, True, 2), 8)


_ABOUT_VALUE = {"unset", "lockstep", "size", "shards"}


@settings(max_examples=600, deadline=None)
@given(
    data_parallel=st.sampled_from([1, 2, 3, 4, 6]),
    tensor_parallel=st.sampled_from([1, 2, 3]),
    pipeline_parallel=st.sampled_from([1, 1, 2]),
    moe=st.sampled_from([True, True, None, False]),
    value=st.sampled_from([None, None, -1, 0, 1, 2, 3, 4, 5, 6, 8, 12, True, "2", 2.0]),
    ascends=st.sampled_from([0, 0, 1, 2, 3, 4, 5, None, True, "2"]),
    shards=st.sampled_from([None, 1, 2, 3, 4, 5, 6, 12, 18]),
    cuts=st.just(set(range(1, 19))) | st.sets(st.integers(1, 18)),
)
def test_advice_is_taken_by_every_rule(
    data_parallel: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    moe: bool | None,
    value: object,
    ascends: object,
    shards: int | None,
    cuts: set[int],
) -> None:
    """What a message says to set, to cut or to leave out breaks no rule; each rule speaks once, one about the value.

    What may be set may not be the shard set's size; that is said next, and a set that is cut for it is right.
    """
    setup = Setup(data_parallel, tensor_parallel, moe, pipeline_parallel)

    def broken(value: object, ascends: object, shards: int | None) -> dict[str, str]:
        found = broken_rules({OPTION: value, **_ascends(ascends)}, setup, shards, cuts.__contains__)
        assert len({rule.rule for rule in found}) == len(found)
        return {rule.rule: rule.message for rule in found}

    found = broken(value, ascends, shards)
    assert len(found.keys() & _ABOUT_VALUE) <= 1
    assert len(found.keys() & {"ascend", "stages", "unset"}) <= 1
    for rule, message in found.items():
        about_ascends = message.startswith("finegrained_tp_config")
        if listed := re.search(r"may be ([0-9, or]*[0-9])", message):
            for size in map(int, re.findall("[0-9]+", listed[1])):
                after = broken(None, size, size) if about_ascends else broken(size, 0, size)
                assert not after.keys() - {"stages"}, "whose advice is another's"
                assert about_ascends or size in cuts
        for size in map(int, re.findall(r"set it to ([0-9]+)", message)):
            assert broken(size, ascends, shards).keys() <= found.keys() - _ABOUT_VALUE
        for size in map(int, re.findall(r"reshard split --tp ([0-9]+)", message)):
            assert not broken(value, ascends, size).keys() & _ABOUT_VALUE
        if "leave it out" in message:
            left_out = broken(value, 0, shards) if about_ascends else broken(None, ascends, shards)
            assert rule not in left_out
            assert left_out.keys() <= found.keys() - {rule} | {"unset"}, "which says how to cut it"
