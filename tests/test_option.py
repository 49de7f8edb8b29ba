"""denseffn_tensor_parallel_size: each rule has one message, and none advises what another forbids."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.option import OPTION, Setup, broken_rules, option_of


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


def test_beside_tensor_parallelism() -> None:
    assert _messages(8, Setup(16, 2, moe=True), 8) == [
        "denseffn_tensor_parallel_size is 8, tensor-parallel size 2: it splits over data-parallel ranks, at "
        "tensor-parallel size 1 only; leave one of the two out"
    ]


def test_a_model_without_experts() -> None:
    """What a rank of such a model is told of its data-parallel size is 1: nothing is said of that."""
    for setup in (Setup(16, 1, moe=False), Setup(1, 1, moe=False)):
        (message,) = _messages(8, setup, 8)
        assert message.startswith("denseffn_tensor_parallel_size is 8, and the model has no expert layers")


def test_another_set() -> None:
    assert _messages(4, Setup(16, 1, moe=True), 8) == [
        "denseffn_tensor_parallel_size is 4, the shard set is cut for 8: set it to 8, or cut it with reshard split "
        "--tp 4"
    ]


def test_another_set_whose_size_the_option_may_not_have() -> None:
    assert _messages(4, Setup(4, 1, moe=True), 8) == [
        "denseffn_tensor_parallel_size is 4, the shard set is cut for 8: cut it with reshard split --tp 4"
    ]


@pytest.mark.parametrize("key", ["denseffn_tp_size", "dense_ffn_tensor_parallel_size", "denseffn_tensor_parallel"])
def test_another_name(key: str) -> None:
    (rule,) = broken_rules({key: 8}, Setup(16, 1, moe=True))
    assert rule.message == f"{key} in the additional config is no option; denseffn_tensor_parallel_size is"


def test_others_keys_are_theirs() -> None:
    others = {"torchair_graph_config": {}, "ascend_scheduler_config": {}, "finegrained_tp_config": {"x": 1}}
    assert not broken_rules({OPTION: 8, **others}, Setup(16, 1, moe=True))


def test_two_owners_of_the_same_layers() -> None:
    (message,) = _messages(8, Setup(16, 1, moe=True), 8, finegrained_tp_config={"mlp_tensor_parallel_size": 4})
    assert message == (
        "denseffn_tensor_parallel_size is 8 and finegrained_tp_config.mlp_tensor_parallel_size 4: both cut the same "
        "layers; leave one of the two out"
    )


def test_ascends_zero_is_off() -> None:
    off = {"finegrained_tp_config": {"mlp_tensor_parallel_size": 0}}
    assert not broken_rules({OPTION: 8, **off}, Setup(16, 1, moe=True), 8)
    assert not broken_rules(off, Setup(16, 8, moe=True), 8)


_sizes = st.integers(1, 64)


@given(_sizes, st.integers(-1, 65), _sizes, st.sampled_from([True, False, None]), st.none() | _sizes)
def test_advice_is_taken_by_every_rule(
    data_parallel: int, value: int, tensor_parallel: int, moe: bool | None, shards: int | None
) -> None:
    """What a message says the option may be breaks no rule about its size; each rule speaks once."""
    rules = broken_rules({OPTION: value}, Setup(data_parallel, tensor_parallel, moe), shards)
    assert len({rule.rule for rule in rules}) == len(rules)
    for rule in rules:
        advised = re.findall(r"may be ([0-9, or]+)|set it to ([0-9]+)", rule.message)
        for size in (int(number) for pair in advised for part in pair for number in re.findall("[0-9]+", part)):
            after = broken_rules({OPTION: size}, Setup(data_parallel, tensor_parallel, moe), None)
            assert not {"size"} & {rule.rule for rule in after}
