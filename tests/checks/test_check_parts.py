"""`reshard check` of sets of other parts than the DenseFFN, for a serving setup: the engine's hook says the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.checking import findings
from tests.support.running import split_parts
from tests.vllm.models import write_model

HEAD, O_PROJ = "lmhead_tensor_parallel_size", "oproj_tensor_parallel_size"
Said = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sets of three parts."""
    folder = tmp_path_factory.mktemp("parts")
    return split_parts(
        write_model(folder / "model", layers=2, dense=1), folder / "sets", denseffn=2, lm_head=4, o_proj=4
    )


def _options(sizes: dict[str, Any], *more: object, tensor: int = 1) -> list[object]:
    """Of a decode node."""
    additional = {"recompute_scheduler_enable": True, "finegrained_tp_config": sizes}
    node = ["--kv-role", "kv_consumer", "--data-parallel-size", 8, "--tensor-parallel-size", tensor]
    return ["--additional-config", json.dumps(additional), *node, *more]


def _about_sizes(found: list[dict[str, Any]]) -> Said:
    about = [each for each in found if each["check"] in ("option-unset", "option-shards")]
    return {(each["check"], each["severity"]): each["message"] for each in about}


@pytest.mark.parametrize(
    ("sizes", "tensor", "said"),
    [
        ({HEAD: 4}, 1, {}),
        ({}, 4, {}),
        (
            *({}, 1),
            {
                (
                    "option-unset",
                    "error",
                ): f"{HEAD} is not set, the shard set is cut for 4, the engine's LM head is for 1: "
                "set it to 4, or take the set away"
            },
        ),
        (
            *({}, 2),
            {
                (
                    "option-unset",
                    "error",
                ): f"{HEAD} is not set, the shard set is cut for 4, the engine's LM head is for 2: "
                "set it to 4, or cut it with reshard split --part lm_head --tp 2"
            },
        ),
        (
            *({HEAD: 8}, 1),
            {
                ("option-shards", "error"): f"{HEAD} is 8, the shard set is cut for 4, the engine's LM head is for 8: "
                "set it to 4, or cut it with reshard split --part lm_head --tp 8"
            },
        ),
        ({HEAD: 3}, 1, {}),  # which the rule `ascend` speaks of
    ],
)
def test_a_set_and_its_option(parts: Path, sizes: dict[str, Any], tensor: int, said: Said) -> None:
    code, found = findings(parts / "lm_head", *_options(sizes, tensor=tensor))
    assert _about_sizes(found) == said
    wrong = {each["check"] for each in found if each["severity"] == "error"}
    assert wrong == {check for check, _ in said} | ({"option-ascend"} if 3 in sizes.values() else set())
    assert code == (3 if wrong else 0)


def test_beside_others_a_set_that_is_not_used_is_a_warning(parts: Path) -> None:
    """One folder serves nodes with different options; a size that the engine has otherwise is wrong there, too."""
    sizes = {HEAD: 4, "mlp_tensor_parallel_size": 2}
    unused = (
        f"{O_PROJ} is not set, the shard set is cut for 4, the engine's o_proj is for 1: the part is loaded "
        "whole, from the model; for less memory and reading, set it to 4"
    )
    code, found = findings(parts, *_options(sizes))
    assert _about_sizes(found) == {("option-unset", "warning"): unused}
    assert code == 0
    assert findings(parts, *_options(sizes, "--strict"))[0] == 3
    code, found = findings(parts, *_options(sizes | {O_PROJ: 2}))
    assert _about_sizes(found).keys() == {("option-shards", "error")}
    assert code == 3


def test_no_size_is_advised_that_vllm_ascend_does_not_take(parts: Path) -> None:
    """o_proj's stands at tensor-parallel size 1."""
    message = (
        f"{O_PROJ} is not set, the shard set is cut for 4, the engine's o_proj is for 2: cut it with reshard split "
    )
    assert _about_sizes(findings(parts / "o_proj", *_options({}, tensor=2))[1]) == {
        ("option-unset", "error"): f"{message}--part o_proj --tp 2"
    }
    two_ranks = _options({HEAD: 2, "mlp_tensor_parallel_size": 2}, "--data-parallel-size", 2)
    (message,) = (_about_sizes(findings(parts, *two_ranks)[1])[key] for key in [("option-unset", "warning")])
    assert message.endswith("the engine's o_proj is for 1: the part is loaded whole, from the model")


def test_beside_others_the_dense_ffn_that_is_not_used_is_a_warning(parts: Path) -> None:
    sizes = {HEAD: 4, O_PROJ: 4}
    code, found = findings(parts, *_options(sizes))
    assert _about_sizes(found) == {
        (
            "option-unset",
            "warning",
        ): "denseffn_tensor_parallel_size is not set, the shard set is cut for 2, the engine's "
        "dense layers are for 1: the part is loaded whole, from the model; for less memory and reading, set it to 2"
    }
    assert code == 0
    assert _about_sizes(findings(parts / "denseffn", *_options(sizes))[1]).keys() == {("option-unset", "error")}
