"""`reshard check` for a device and for a serving setup."""

import json
import re
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.checks.report import Request, Serving
from reshard.checks.run import check_config
from reshard.checks.serving_option import OPTION, RULES
from tests.support.checking import failed, findings, of, setup, usage
from tests.support.paths import CONFIGS
from tests.support.running import reshard, reshard_process

R1 = CONFIGS / "deepseek-r1.json"


def small(tmp_path: Path, **sizes: int) -> Path:
    values = json.loads(R1.read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


@pytest.mark.parametrize("scheme", ["bf16", "w8a8_dynamic", "w8a8_static", "w8a8_mix"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_r1_is_whole_tiles(scheme: str, tp: int) -> None:
    code, found = findings("--config", R1, "--scheme", scheme, "--tp", tp, "--device", "npu", "--strict")
    assert code == 0
    assert [f["severity"] for check in ("kernels", "tiles", "limits") for f in of(found, check)] == ["ok"] * 3


@pytest.mark.parametrize(("scheme", "rows", "columns"), [("bf16", 16, 16), ("w8a8_dynamic", 16, 32)])
@pytest.mark.parametrize(("share", "hidden"), [(16, 32), (24, 32), (32, 32), (40, 32), (48, 32), (48, 16), (48, 8)])
def test_tiles_are_16_x_16_in_bf16_and_16_x_32_in_int8(
    tmp_path: Path, scheme: str, rows: int, columns: int, share: int, hidden: int
) -> None:
    """Of the matrices [in, out] that a device holds: a tile that is not full is padded."""
    file = small(tmp_path, intermediate_size=2 * share, hidden_size=hidden)
    arguments = ("--config", file, "--scheme", scheme, "--tp", 2, "--device", "npu")
    code, found = findings(*arguments)
    assert code == 0, "padded tiles are right, if slow"
    wrong = [f["message"] for f in of(found, "tiles") if f["severity"] == "warning"]
    held = {"gate_up_proj": (hidden, 2 * share), "down_proj": (share, hidden)}
    padded = [role for role, (k, n) in held.items() for size, side in ((k, rows), (n, columns)) if size % side]
    assert sorted(line.split(".")[4] for line in wrong) == sorted(padded)
    assert all(("whatever the group size" in line) == ("hidden_size = " in line) for line in wrong)
    assert reshard("check", *arguments, "--strict").code == (3 if wrong else 0)


def test_hidden_size_is_a_side_of_the_tiles_too(tmp_path: Path) -> None:
    found = findings(
        "--config", small(tmp_path, hidden_size=7184), "--scheme", "w8a8_dynamic", "--tp", 8, "--device", "npu"
    )
    (tiles,) = of(found[1], "tiles")
    assert (tiles["severity"], tiles["message"]) == (
        "warning",
        "model.layers.0.mlp.down_proj.weight [7184, 2304]: hidden_size = 7184 is no multiple of 32: down_proj is no "
        "whole 16 x 32 tiles of INT8 and would be padded, whatever the group size",
    )


@pytest.mark.parametrize(("size", "fits"), [(65_535, True), (65_536, False)])
@pytest.mark.parametrize("dim", ["hidden_size", "intermediate_size"])
def test_int8_matrices_are_up_to_65535_wide(tmp_path: Path, dim: str, size: int, fits: bool) -> None:
    file = small(tmp_path, **{dim: size if dim == "hidden_size" else size // 2 * 2})
    tp = 1 if dim == "hidden_size" else 2  # [2L, H]: 2L is the size
    wide = size if dim == "hidden_size" else size // 2 * 2
    wrong = failed("--config", file, "--scheme", "w8a8_dynamic", "--tp", tp, "--device", "npu")
    assert bool(wrong) == (wide > 65_535) == (not fits)
    way = "whatever the group size; BF16 has no such limit" if dim == "hidden_size" else ": cut it for a larger group"
    assert all(check == "limits" and "up to 65535" in message and way in message for check, message in wrong)
    assert failed("--config", file, "--scheme", "bf16", "--tp", tp, "--device", "npu") == []


def test_fp8_has_no_kernel_on_an_npu() -> None:
    code, found = findings("--config", R1, "--tp", 8, "--device", "npu")
    assert code == 0
    (kernels,) = of(found, "kernels")
    assert kernels["severity"] == "warning"
    assert "cut with --weights w8a8 or --weights bf16" in kernels["message"]
    assert of(findings("--config", R1, "--tp", 8, "--weights", "w8a8", "--device", "npu")[1], "kernels")[0] == {
        "check": "kernels",
        "where": "",
        "message": "w8a8_dynamic as stored",
        "severity": "ok",
    }


def test_without_torch_npu_the_forward_is_not_checked() -> None:
    done = reshard_process(
        *("check", "--config", R1, "--tp", "8", "--device", "npu", "--format", "json"),
        before="import sys; sys.modules['torch'] = None",
    )
    assert done.code == 0
    (forward,) = of(done.document["targets"][0]["findings"], "forward")
    assert forward["severity"] == "skipped"
    assert forward["message"].startswith("not checked: torch_npu is not installed here")


@pytest.mark.parametrize(
    ("raises", "says"),
    [("AttributeError('of another torch')", "of another torch"), ("OSError", "OSError"), ("KeyError(1)", "1")],
)
def test_a_torch_npu_that_cannot_be_imported_is_no_traceback(tmp_path: Path, raises: str, says: str) -> None:
    (tmp_path / "torch_npu.py").write_text(f"raise {raises}")
    done = reshard_process(
        *("check", "--config", R1, "--tp", "8", "--device", "npu", "--format", "json"),
        before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
    )
    assert done.code == 0
    (forward,) = of(done.document["targets"][0]["findings"], "forward")
    assert forward["severity"] == "skipped"
    assert forward["message"] == f"not checked: torch_npu is installed and cannot be imported: {says}"


def test_the_cpu_has_no_tiles_and_no_limits() -> None:
    found = findings("--config", R1, "--tp", 8)[1]
    assert not {"kernels", "tiles", "limits", "forward"} & {f["check"] for f in found}


def test_a_right_setup() -> None:
    code, found = findings("--config", R1, *setup(8, 16))
    assert code == 0
    (option,) = of(found, "option")
    assert option["message"] == (f"{OPTION} 8, data-parallel size 16, tensor-parallel size 1: {len(RULES)} rules kept")
    code, found = findings("--config", R1, *setup(16, 16, 4), "--pipeline-parallel-size", 2, "--weights", "w8a8")
    assert code == 0
    (option,) = of(found, "option")
    assert option["message"] == (
        f"{OPTION} 16, data-parallel size 16, tensor-parallel size 4, pipeline-parallel size 2: {len(RULES)} rules kept"
    )
    assert of(found, "divides")[0]["where"] == "tp 16"


@pytest.mark.parametrize(
    ("arguments", "rule", "says"),
    [
        (setup(3, 16), "size", "is 3; with data-parallel size 16 it may be 1, 2, 4, 8 or 16"),
        (setup("8", 16), "size", "is '8'; with data-parallel size 16 it may be 1, 2, 4, 8 or 16"),
        (setup(1, 4, 2), "size", "is 1; with data-parallel size 4 and tensor-parallel size 2 it may be 2, 4 or 8"),
        (setup(3, 10), "size", "size 10 it may be 1 or 2 (not 5 or 10, which the layers cannot be cut for)"),
        (setup(2, 1), "size", "is 2; with data-parallel size 1 it may be 1"),
        (["--additional-config", '{"denseffn_tp_size": 8}'], "name", "denseffn_tp_size in the additional config is no"),
    ],
)
def test_a_wrong_setup_is_one_line(arguments: list[object], rule: str, says: str) -> None:
    ((check, message),) = failed("--config", R1, *arguments)
    assert check == f"option-{rule}"
    assert says in message


def test_a_model_without_experts_cannot_be_split_over_data_parallel_ranks() -> None:
    ((check, message),) = failed("--config", CONFIGS / "llama-3.1-8b.json", *setup(8, 16))
    assert check == "option-lockstep"
    assert "use tensor parallelism for it" in message


def test_what_is_no_json_object_is_wrong_usage() -> None:
    for text, says in (
        ("{", "--additional-config: not valid JSON"),
        ("[8]", "--additional-config is [8]: give a JSON object"),
        ("5", "--additional-config is 5: give a JSON object"),
        ("null", "--additional-config is null: give a JSON object"),
        ('{"a":1,"a":2}', "duplicate key 'a'"),
    ):
        assert says in usage("--config", R1, "--additional-config", text)


def test_ascends_own_split_is_judged() -> None:
    def said(value: object, *more: object) -> list[tuple[str, str]]:
        additional = json.dumps({"finegrained_tp_config": {"mlp_tensor_parallel_size": value}})
        return failed("--config", R1, "--additional-config", additional, "--data-parallel-size", 16, *more)

    assert said(8) == said(8, "--tensor-parallel-size", 4) == said(0, "--pipeline-parallel-size", 2) == []
    ((check, message),) = said(8, "--pipeline-parallel-size", 2)
    assert check == "option-stages"
    assert "is 8, pipeline-parallel size 2: vllm-ascend's groups for it mix ranks of different stages" in message
    ((check, message),) = said("8")
    assert check == "option-ascend"
    assert "is '8'; with data-parallel size 16 it may be 1, 2, 4, 8 or 16" in message


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["deepseek-r1", "deepseek-v2-lite", "kimi-k2"]),
    st.sampled_from(["bf16", "fp8_block", "w8a8_dynamic"]),
    st.sampled_from([1, 2, 3, 4, 5, 12, 16, 18, 32]),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from(["cpu", "npu"]),
)
def test_a_size_that_is_advised_passes_every_check(
    model: str, scheme: str, data: int, tensor: int, pad: bool, device: Literal["cpu", "npu"]
) -> None:
    """The first public implementation gave advice that another of its messages forbade."""

    def wrong(value: int) -> dict[str, str]:
        serving = Serving({OPTION: value}, data, tensor)
        request = Request(scheme=scheme, pad=pad, device=device, serving=serving)
        report = check_config(str(CONFIGS / f"{model}.json"), request)
        return {finding.check: finding.message for finding in report.of("error")}

    ((check, message),) = wrong(-1).items()
    assert check == "option-size"
    if "would have to be" in message:
        sizes, passes = re.search(r"would have to be ([0-9, or]+),", message), False
    else:
        sizes, passes = re.search(r"may be ([0-9, or]*[0-9])", message), True
    assert sizes
    for size in map(int, re.findall("[0-9]+", sizes[1])):
        assert bool(wrong(size)) is not passes
    if barred := re.search(r"\(not ([0-9, or]+),", message):
        assert all(wrong(size) for size in map(int, re.findall("[0-9]+", barred[1])))
