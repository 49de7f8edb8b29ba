"""vllm-ascend's own sizes of fine-grained tensor parallelism: each rule breaks alone, with one message."""

from dataclasses import replace
from typing import Any

import pytest

from reshard.checks.ascend_option import RULES
from reshard.checks.serving_option import broken_rules
from reshard.checks.setup import Setup
from tests.support.checking import failed, findings, of
from tests.support.paths import CONFIGS

DECODES = Setup(16, 1, True, 1, enforce_eager=False, decode_node=True)
"""A decode node in graph mode: any size may stand in it."""
MLP, HEAD, EMBEDDING, O_PROJ = (f"{part}_tensor_parallel_size" for part in ("mlp", "lmhead", "embedding", "oproj"))


def config(**sizes: object) -> dict[str, Any]:
    return {
        "recompute_scheduler_enable": True,
        "finegrained_tp_config": {f"{part}_tensor_parallel_size": size for part, size in sizes.items()},
    }


ALL = config(mlp=8, lmhead=16, embedding=4, oproj=2)


def said(additional_config: dict[str, Any], setup: Setup) -> dict[str, str]:
    found = broken_rules(additional_config, setup)
    assert len({rule.rule for rule in found}) == len(found)
    return {rule.rule: rule.message.replace("finegrained_tp_config.", "") for rule in found}


def test_a_decode_node_may_have_all_four_of_any_sizes() -> None:
    assert said(ALL, DECODES) == {}
    in_main = {"finegrained_tp_config": ALL["finegrained_tp_config"]}
    assert said({**in_main, "scheduler_config": {"recompute_scheduler_enable": True}}, DECODES) == {}


@pytest.mark.parametrize(
    ("sizes", "setup", "rule", "message"),
    [
        (
            {"lmhead": 3},
            DECODES,
            "ascend",
            f"{HEAD} is 3; with data-parallel size 16 it may be 1, 2, 4, 8 or 16",
        ),
        (
            {"embedding": "8", "oproj": 32},
            DECODES,
            "ascend",
            f"{EMBEDDING} is '8'; with data-parallel size 16 it may be 1, 2, 4, 8 or 16; "
            f"{O_PROJ} is 32; with data-parallel size 16 it may be 1, 2, 4, 8 or 16",
        ),
        (
            {"oproj": 8},
            replace(DECODES, moe=False),
            "ascend",
            f"{O_PROJ} is 8, and the model has no MoE layers: vllm-ascend takes it for models that have some; leave it "
            "out",
        ),
        (
            {"lmhead": 8},
            replace(DECODES, pipeline_parallel_size=2),
            "stages",
            f"{HEAD} is 8, pipeline-parallel size 2: vllm-ascend's groups for it mix ranks of different stages; leave "
            "it out",
        ),
        (
            {"oproj": 8, "lmhead": 8},
            replace(DECODES, tensor_parallel_size=2),
            "heads",
            f"{O_PROJ} is 8, tensor-parallel size 2: vllm-ascend takes it at tensor-parallel size 1 only; leave one of "
            "the two out",
        ),
        (
            {"oproj": 1, "embedding": 8},
            replace(DECODES, enforce_eager=True),
            "graph",
            f"{O_PROJ} is 1, with enforce_eager: vllm-ascend takes it in graph mode only; leave one of the two out",
        ),
        (
            {"oproj": 8, "mlp": 8},
            replace(DECODES, decode_node=False),
            "decode",
            f"{O_PROJ} is 8, in a node that is no KV consumer: vllm-ascend takes it in decode nodes only, with kv_role "
            "kv_consumer or kv_both; leave it out of others",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value in RULES else "",
)
def test_each_rule_breaks_alone(sizes: dict[str, object], setup: Setup, rule: str, message: str) -> None:
    assert said(config(**sizes), setup) == {rule: message}
    assert said(config(**dict.fromkeys(sizes, 0)), setup) == {}, "0 is off"


def test_steps_of_one_length_are_needed_from_0_23_on() -> None:
    """A warning: 0.18 does not ask for it."""
    without = {**ALL, "recompute_scheduler_enable": False}
    (found,) = broken_rules(without, DECODES)
    assert (found.rule, found.warning) == ("recompute", True)
    assert found.message == "; ".join(
        f"finegrained_tp_config.{key} is {size}, without recompute_scheduler_enable: vllm-ascend from 0.23 on takes it "
        "with that only, in decode nodes; set it, or leave the size out"
        for key, size in ((O_PROJ, 2), (EMBEDDING, 4))
    )


def test_the_head_s_rows_are_sampled_whole() -> None:
    assert said({**ALL, "enable_reduce_sample": True}, DECODES) == {
        "sampling": f"{HEAD} is 16, with enable_reduce_sample: vllm-ascend takes one of them; leave the other out"
    }


def test_what_the_engine_has_judged_is_not_judged_again() -> None:
    """Its hook knows no more of the node than the engine, which has refused what its version does not take."""
    assert said({**ALL, "recompute_scheduler_enable": False}, Setup(16, 1, moe=True)) == {}


@pytest.mark.parametrize("key", ["lm_head_tensor_parallel_size", "o_proj_tensor_parallel_size"])
def test_a_key_that_is_misspelt(key: str) -> None:
    right = key.replace("_head", "head").replace("_proj", "proj")
    assert said({"finegrained_tp_config": {key: 8}}, DECODES) == {
        "place": f"{key} is no key of finegrained_tp_config; {right} is"
    }
    assert said({right: 8}, DECODES) == {
        "place": f"{right} stands at the top of the additional config, where nothing reads it; it belongs in "
        "finegrained_tp_config"
    }
    assert said({"finegrained_tp_config": {"olora_tensor_parallel_size": 8}}, DECODES) == {}


R1 = CONFIGS / "deepseek-r1.json"
SETUP = ("--config", R1, "--data-parallel-size", 16, "--additional-config")


def test_check_says_them_of_a_node() -> None:
    o_proj = '{"recompute_scheduler_enable": true, "finegrained_tp_config": {"oproj_tensor_parallel_size": 8}}'
    assert failed(*SETUP, o_proj, "--kv-role", "kv_consumer") == failed(*SETUP, o_proj, "--kv-role", "kv_both") == []
    assert [check for check, _ in failed(*SETUP, o_proj)] == ["option-decode"]
    assert [check for check, _ in failed(*SETUP, o_proj, "--kv-role", "kv_producer")] == ["option-decode"]
    assert [check for check, _ in failed(*SETUP, o_proj, "--kv-role", "kv_both", "--enforce-eager")] == ["option-graph"]


def test_check_warns_of_what_only_newer_versions_ask_for() -> None:
    embedding = '{"finegrained_tp_config": {"embedding_tensor_parallel_size": 8}}'
    code, found = findings(*SETUP, embedding)
    (warned,) = of(found, "option-recompute")
    assert (code, warned["severity"]) == (0, "warning")
    assert findings(*SETUP, embedding, "--strict")[0] == 3
