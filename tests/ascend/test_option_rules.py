"""What `check` says of vllm-ascend's sizes, beside what vllm-ascend itself refuses: its FinegrainedTPConfig."""

import inspect
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_ascend.ascend_config import FinegrainedTPConfig

from reshard.checks.ascend_option import KEYS, broken_rules
from reshard.checks.setup import Setup

_SAYS = inspect.getsource(FinegrainedTPConfig)
# 0.18 takes these, and fails later: its layers and groups do not fit.
_MODELS = (True, False) if "is_moe" in _SAYS else (True,)
ENGINES = {"ascend", "graph", "decode"} | ({"heads"} if "parallel_config.tensor_parallel_size" in _SAYS else set())
"""Rules that it has itself; of several that are broken it says the first only."""


def _refused(sizes: dict[str, Any], setup: Setup) -> bool:
    transfer = SimpleNamespace(is_kv_consumer=setup.decode_node)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=setup.tensor_parallel_size, data_parallel_size=setup.data_parallel_size
        ),
        model_config=SimpleNamespace(enforce_eager=setup.enforce_eager, is_moe=setup.moe),
        kv_transfer_config=transfer if setup.decode_node is not None else None,
    )
    try:
        FinegrainedTPConfig(sizes, config)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("key", KEYS)
def test_the_rules_are_the_engine_s(key: str) -> None:
    seen = set()
    for data, tensor, moe, eager, decodes, size in product(
        (1, 4, 6), (1, 2), _MODELS, (True, False), (True, False), (0, 1, 2, 3, 4, 8)
    ):
        setup = Setup(data, tensor, moe, 1, eager, decodes)
        broken = {rule.rule for rule in broken_rules({"finegrained_tp_config": {key: size}}, setup)}
        assert bool(broken & ENGINES) == _refused({key: size}, setup), (key, size, setup)
        seen |= broken & ENGINES
    assert seen == (ENGINES if key.startswith("oproj") else {"ascend"})
