"""`reshard check` on checkpoints, config.json files and serving setups."""

import json
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.config_only import config_checkpoint
from reshard.checks.report import CHECKS
from reshard.checks.serving_option import OPTION
from reshard.model.naming import parse_tensor
from reshard.plan.plan import make_plan
from reshard.safe_text import safe_line
from reshard.schemes.table import SCHEMES
from reshard.source.open import describe, open_source
from tests.support.builders import RECIPES, Spec, build, tensors_of
from tests.support.cases import CASES, bad_source, listing
from tests.support.checking import failed, findings, of, usage
from tests.support.corrupt import DOWN, GATE, both, config, tensors
from tests.support.models import DENSE_LAYERS, FROZEN, MODELS
from tests.support.paths import CONFIGS
from tests.support.running import reshard, reshard_process

R1 = CONFIGS / "deepseek-r1.json"
_FP8 = json.loads(R1.read_text())["quantization_config"]
# Headers do not tell these: split compares the two values, verify and a second cut hash the shards.
NEEDS_VALUES = {"gate and up of different input_scale", "set with a changed shard"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    code, found = findings(tmp_path / "model", "--tp", "1,2,4", "--device", "npu")
    assert code == 0
    assert {f["severity"] for f in found} <= {"ok", "warning", "skipped"}
    assert {f["check"] for f in found} <= set(CHECKS)
    assert [f["where"] for f in of(found, "divides")] == ["tp 1", "tp 2", "tp 4"]


def test_real_checkpoints_pass(real_checkpoint: Path) -> None:
    assert failed(real_checkpoint, "--tp", 2) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_every_bad_input_fails_in_the_words_of_split(case: Any, tmp_path: Path) -> None:
    source = bad_source(case, tmp_path)
    before = listing(tmp_path)
    if case.tp_size < 1:
        assert "--tp 0: '0' is no group size" in usage(source, "--tp", case.tp_size)
        return
    done = reshard("check", source, *([] if case.cut else ["--tp", case.tp_size]), "--format", "json")
    wrong = [f for t in done.document["targets"] for f in t["findings"] if f["severity"] == "error"]
    assert (not wrong) == (case.name in NEEDS_VALUES)
    if not wrong:
        return
    assert done.code == (1 if wrong[0]["check"] == "input" else 3)
    said = " ".join(f"{f['where']}: {f['message']}" for f in wrong)
    assert [part for part in case.says if part not in said] == [], said
    assert listing(tmp_path) == before


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_a_config_alone_promises_the_dense_ffn_and_no_more(model: str, scheme: str) -> None:
    """The first public implementation of the option caught MoE layers. The names are frozen, not computed."""
    config_json = json.loads((CONFIGS / f"{model}.json").read_text())
    checkpoint = config_checkpoint(config_json, model, scheme)
    assert sorted(tensor.name for tensor in checkpoint.tensors()) == FROZEN[model][scheme]
    assert [layer.index for layer in checkpoint.layers] == DENSE_LAYERS[model]
    plan = make_plan(checkpoint, 2, pad=True)
    sliced = {piece.tensor for shard in plan.shards for tensor in shard.tensors for piece in tensor.slices}
    assert all(parse_tensor(name) for name in sliced)


def test_moe_layers_and_the_mtp_layer_are_left_alone() -> None:
    (layers,) = of(findings("--config", R1)[1], "layers")
    assert layers["message"] == (
        "3 dense layers (0-2), as config.json says (first_k_dense_replace = 3, moe_layer_freq = 1); 58 MoE layers "
        "and 1 MTP layer left alone"
    )


def test_an_expert_layer_with_dense_names_is_caught(tmp_path: Path) -> None:
    """Layer 2 is a mixture of experts by config.json: dense weights there are no reason to cut it."""
    extra = {f"model.layers.2.mlp.{r}_proj.weight": t for r, t in _dense_weights().items()}
    build(tmp_path / "model", Spec())
    tensors(lambda every: every.update(extra))(tmp_path / "model")
    ((check, message),) = failed(tmp_path / "model", "--tp", 2)
    assert check == "layers"
    assert "gives 0-1, the names give 0-2" in message


def _dense_weights() -> dict[str, Any]:
    every = tensors_of(Spec())
    return {role: every[f"model.layers.0.mlp.{role}_proj.weight"] for role in ("gate", "up", "down")}


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"mindie", "modelslim_float"}))
def test_a_promised_checkpoint_is_what_a_real_one_is_read_as(tmp_path: Path, recipe: str) -> None:
    """Schemes that config.json tells, or that are named: the same tensors, and the same cut."""
    build(tmp_path / "model", Spec(recipe, down_recipe=None))
    config_json = json.loads((tmp_path / "model" / "config.json").read_text())
    with open_source(str(tmp_path / "model")) as source:
        real = describe(source)
    told = RECIPES[recipe].description is None
    made = config_checkpoint(config_json, "model", None if told else RECIPES[recipe].scheme)
    assert [layer.index for layer in made.layers] == [layer.index for layer in real.layers]
    weights = [{t.name: (t.dtype, t.shape) for t in c.tensors() if t.name.endswith("weight")} for c in (made, real)]
    if recipe == "fp16":  # the builder's config says bfloat16 of every model
        return
    if recipe != "fp32":
        assert weights[0] == weights[1]
    shapes = [{t.name: t.shape for t in c.tensors()} for c in (made, real)]
    shared = shapes[0].keys() & shapes[1].keys()
    assert {name: shapes[0][name] for name in shared} == {name: shapes[1][name] for name in shared}
    if told:
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch_dtype": ["bfloat16"], "quantization_config": None}, "dtype is ['bfloat16']; a model of bfloat16,"),
        (
            {"intermediate_size": 10**200},
            "intermediate_size is 100000000000000000...0000000000000000000, expected a whole number from 1 to 2147483",
        ),
        (
            {"quantization_config": {**_FP8, "modules_to_not_convert": ["model.layers.1.mlp.up_proj"]}},
            "model.layers.1.mlp: gate_proj is fp8_block (weight, weight_scale_inv), up_proj is bf16 (weight); they are",
        ),
    ],
)
def test_a_config_that_no_checkpoint_can_be_of(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(R1.read_text()) | change))
    ((_, message),) = failed("--config", tmp_path / "config.json", "--tp", 8)
    assert says in message


def test_modelslim_s_scheme_is_named_with_a_config_alone() -> None:
    (scheme,) = of(findings("--config", R1, "--scheme", "w8a8_dynamic")[1], "scheme")
    assert scheme["message"] == "w8a8_dynamic (weight I8, weight_offset F32, weight_scale F32)"
    assert f"unknown scheme w4a4; supported are {', '.join(SCHEMES)}" in usage("--config", R1, "--scheme", "w4a4")


def test_the_default_scheme_is_the_config_s_own() -> None:
    (scheme,) = of(findings("--config", R1)[1], "scheme")
    assert scheme["message"] == "fp8_block (weight F8_E4M3, weight_scale_inv F32, blocks of 128 x 128)"


@pytest.mark.parametrize(
    ("tp", "check", "says"),
    [
        (5, "divides", "18432 over tp 5 gives 3686.4 rows"),
        (
            32,
            "blocks",
            "dim 0 = 18432 over tp 32 gives 576 rows, not a multiple of the 128-row scale block; use a tp of",
        ),
        (18433, "divides", "tp 18433 is greater than intermediate_size 18432; use at most 18432"),
    ],
)
def test_a_cut_that_the_sizes_do_not_allow(tp: int, check: str, says: str) -> None:
    ((found, message),) = failed("--config", R1, "--tp", tp)
    assert found == check
    assert message.startswith(f"tp {tp}: ")
    assert says in message


@pytest.mark.parametrize(("tp", "way"), [(32, True), (5, False)])
def test_bf16_is_a_way_out_only_where_it_is_one(tp: int, way: bool) -> None:
    ((_, message),) = failed("--config", R1, "--tp", tp)
    assert ("--weights bf16" in message) is way
    assert (failed("--config", R1, "--tp", tp, "--weights", "bf16") == []) is way


def test_the_way_out_of_a_cut_passes() -> None:
    for way in (["--pad"], ["--weights", "bf16"], ["--weights", "w8a8"]):
        assert failed("--config", R1, "--tp", 32, *way) == []


def test_each_size_is_judged_by_itself() -> None:
    wrong = failed("--config", R1, "--tp", "8,5,16,32")
    assert [(check, message.split(":")[0]) for check, message in wrong] == [("divides", "tp 5"), ("blocks", "tp 32")]


def test_without_a_size_no_cut_is_judged() -> None:
    found = findings("--config", R1)[1]
    assert [f["message"] for f in of(found, "divides")] == ["not checked: no size to cut for; give --tp"]
    assert [f["severity"] for f in of(found, "divides") + of(found, "blocks")] == ["skipped", "skipped"]


def test_the_option_s_size_is_judged_too() -> None:
    arguments = ["--additional-config", json.dumps({OPTION: 32}), "--data-parallel-size", 32]
    ((check, message),) = failed("--config", R1, *arguments, "--tp", 8)
    assert (check, message[:6]) == ("blocks", "tp 32:")


@pytest.mark.parametrize(
    ("option", "data", "tensor"), [(5, 32, 1), (99_999_999_999, 32, 1), (5, 10, 2), (8, 99_999, 99_999)]
)
def test_an_option_that_may_not_stay_is_judged_by_its_own_rules_alone(option: int, data: int, tensor: int) -> None:
    """divides would offer sizes, or --pad, that the option's own line forbids."""
    sizes = ["--data-parallel-size", data, "--tensor-parallel-size", tensor]
    arguments = ["--additional-config", json.dumps({OPTION: option}), *sizes]
    for more in ([], ["--tp", 8]):
        assert [check for check, _ in failed("--config", R1, *arguments, *more)] == ["option-size"]
    (divides,) = of(findings("--config", R1, *arguments)[1], "divides")
    assert divides["message"] == "not checked: see option-size"


def test_nothing_to_check_is_wrong_usage() -> None:
    assert "give a PATH, or --config FILE" in usage()


@pytest.mark.parametrize("tp", ["", "0", "-1", "8,", "a", "8 16", "100000", "²"])
def test_sizes_that_are_none(tp: str) -> None:
    assert "is no group size; write them as 4,8" in usage("--config", R1, f"--tp={tp}")


def test_options_that_do_not_go_with_the_target(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    assert "unknown scheme int4; supported are bf16, w8a8_dynamic" in usage(tmp_path / "model", "--scheme", "int4")
    assert "--against goes with a shard set" in usage(tmp_path / "model", "--against", "x")
    assert "--against goes with a shard set" in usage("--config", R1, "--against", "x")


def test_what_cannot_be_read_is_1_and_the_others_are_checked_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    done = reshard("check", tmp_path / "none", tmp_path / "bad.json", R1, "--tp", "5")
    assert done.code == 1
    first, second = done.err.splitlines()
    assert first == f"error: {tmp_path}/none: no such folder; give the one that holds the checkpoint"
    assert second.startswith(f"error: {tmp_path}/bad.json: not valid JSON")
    assert "FAILED   divides" in done.out
    assert f"{tmp_path}/none\n  FAILED   input  {tmp_path}/none: no such folder" in done.out
    assert done.out.endswith("\n7 checks: 3 ok, 3 failed, 1 not made\n")


def test_an_error_line_names_its_target(tmp_path: Path) -> None:
    """Of a hundred files in a row: every one is called config.json, every folder has one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    done = reshard("check", tmp_path / "a", tmp_path / "b" / "config.json")
    assert done.code == 1
    assert [line.split(": ")[:2] for line in done.err.splitlines()] == [
        ["error", f"{tmp_path}/a"],
        ["error", f"{tmp_path}/b/config.json"],
    ]


@pytest.mark.parametrize("path", ["models/config.json", "nobody/model.json"])
def test_a_config_that_is_not_there_is_no_hub_repository(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = reshard("check", path)
    assert (done.code, done.err) == (1, f"error: {path}: cannot be read: No such file or directory\n")


def test_a_terminal_that_lacks_a_character() -> None:
    done = reshard_process("check", R1, "--tp", "32", PYTHONIOENCODING="ascii")
    assert done.code == 3
    assert "18, 24, 36, \\u2026; or --pad" in done.out
    assert done.err == ""


def test_a_json_file_is_a_config() -> None:
    assert findings(R1, "--tp", 8) == findings("--config", R1, "--tp", 8)


def test_a_truncated_header_cannot_be_read(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    file = tmp_path / "model" / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    ((check, message),) = failed(tmp_path / "model", "--tp", 2)
    assert check == "input"
    assert file.name in message


def test_a_scheme_that_is_not_known_fails(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    both(config(quantization_config={"quant_method": "awq"}))(tmp_path / "model")
    ((check, message),) = failed(tmp_path / "model")
    assert (check, "quant_method awq" in message) == ("scheme", True)


def test_no_config_beside_the_files_is_a_warning(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    (tmp_path / "model" / "config.json").unlink()
    code, found = findings(tmp_path / "model", "--tp", 2)
    assert code == 0
    assert of(found, "layers")[0]["severity"] == "warning"
    assert reshard("check", tmp_path / "model", "--strict").code == 3


def test_no_tensor_is_read_and_no_torch_imported(tmp_path: Path) -> None:
    """A sparse checkpoint is all holes; numpy comes with the source, torch does not."""
    build(tmp_path / "model", Spec("fp8_block"))
    reading = (
        "import atexit, sys; from reshard.source.folder import FolderSource\n"
        "def read_rows(*a): raise SystemExit('a tensor was read')\n"
        "FolderSource.read_rows = read_rows\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    )
    done = reshard_process("check", tmp_path / "model", "--tp", 2, before=reading)
    assert (done.code, done.err.strip()) == (0, "False")


def test_names_that_cannot_be_printed_do_not_reach_a_terminal(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    name = f"{DOWN}.we\x1b[31might"
    tensors(lambda every: every.update({name: every[f"{GATE}.weight"]}))(tmp_path / "model")
    done = reshard("check", tmp_path / "model")
    assert done.code == 3
    assert "\x1b" not in done.out
    assert safe_line(name) in done.out
