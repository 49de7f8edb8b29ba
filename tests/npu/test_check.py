"""`reshard check --device npu` where torch_npu is: its own shape functions judge the forward pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from reshard.schemes.table import SCHEMES
from reshard_runtime.kernels.npu import NpuKernels
from tests.support.checking import failed, findings, of
from tests.support.paths import CONFIGS

R1 = CONFIGS / "deepseek-r1.json"


def forward(*arguments: object) -> dict[str, Any]:
    (found,) = of(findings(*arguments, "--device", "npu")[1], "forward")
    return found


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_r1_s_forward_is_accepted(scheme: str, tp: int) -> None:
    found = forward("--config", R1, "--scheme", scheme, "--tp", tp)
    assert (found["severity"], found["where"]) == ("ok", f"tp {tp}")
    assert found["message"] == "torch_npu accepts every call for 1, 24, 4096 tokens a rank, all layers alike"


def test_a_matrix_that_is_too_wide_is_refused_by_the_forward_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(R1.read_text()) | {"hidden_size": 70_000}))
    arguments = ("--config", tmp_path / "config.json", "--scheme", "w8a8_dynamic", "--tp", 8, "--device", "npu")
    wrong = dict(failed(*arguments))
    assert sorted(wrong) == ["forward", "limits"]
    assert "npu_quant_matmul takes last dims up to 65535" in wrong["forward"]


def test_what_torch_npu_refuses_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is called with a wrong operand: its own words are the line."""
    quantize = NpuKernels.quantize_dynamic
    monkeypatch.setattr(NpuKernels, "quantize_dynamic", lambda self, x: quantize(self, x[:, :-32]))
    ((check, message),) = failed("--config", R1, "--scheme", "w8a8_dynamic", "--tp", 8, "--device", "npu")
    assert check == "forward"
    assert message.startswith("tp 8: model.layers.0.mlp: ")
    assert "k dim of x1 and x2 need be same" in message


@pytest.mark.parametrize(
    ("config", "severity", "said"),
    [
        ({"model_type": "glm5_next_text", "swiglu_limit": 10.0}, "ok", "torch_npu accepts every call"),
        ({"hidden_act": "gelu"}, "ok", "torch_npu accepts every call"),
        ({"hidden_act": "situ"}, "skipped", "not checked: layer 0: its activation is situ, whose formula is not known"),
    ],
)
def test_the_forward_is_that_of_the_layer_s_activation(
    tmp_path: Path, config: dict[str, Any], severity: str, said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(R1.read_text()) | config))
    found = forward("--config", tmp_path / "config.json", "--scheme", "w8a8_dynamic", "--tp", 8)
    assert found["severity"] == severity
    assert found["message"].startswith(said)
