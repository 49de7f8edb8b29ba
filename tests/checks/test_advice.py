"""What a message advises, the same command takes: options that it has there, and sizes that no other check refuses."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard import api
from reshard.checkpoint.config_only import config_checkpoint
from reshard.checks.serving_option import OPTION
from reshard.errors import AlignmentError
from reshard.estimate.profile import load_profile
from reshard.estimate.sizes import Options, Wanted, estimate
from reshard.plan.pipeline import Cut
from reshard.schemes.table import SCHEMES
from tests.support import field
from tests.support.advice import advised_options, advised_sizes, foreign_options
from tests.support.builders import Spec, build
from tests.support.paths import CONFIGS
from tests.support.running import Done, reshard, split

OFFGRID = Spec("fp8_block", intermediate=1088)  # 8.5 blocks of 128
MODELS = ("deepseek-r1", "deepseek-v2-lite", "glm-4.5", "kimi-k2", "llama-3.1-8b")


def _field(name: str) -> Any:
    return lambda folder: field.build(name, folder)


def _spec(spec: Spec) -> Any:
    return lambda folder: build(folder, spec)


@dataclass(frozen=True)
class Case:
    """What a folder is made of, and the options that its refusal names."""

    make: Any
    named: set[str]


CASES = {
    "blocks": Case(_spec(OFFGRID), {"--pad", "--weights"}),
    "rows": Case(_spec(Spec("bf16", intermediate=1001)), {"--pad"}),
    "two accounts": Case(_field("e13-single-and-sharded-index"), {"--index"}),
    "no account": Case(_field("c16-w8a8-description-lost"), {"--scheme"}),
    "two live indexes": Case(_field("h16-two-live-indexes"), {"--index"}),
}
COMMANDS = {
    "split": ("split", "{model}", "{out}", "--tp", 2),
    "check": ("check", "{model}", "--tp", 2),
    "estimate": ("estimate", "{model}", "--tp", 2),
    "inspect": ("inspect", "{model}"),
    "verify": ("verify", "{set}", "--source", "{model}"),
}


def _run(command: tuple[object, ...], folder: Path, *more: object) -> Done:
    at = {"model": folder / "model", "out": folder / "out", "set": folder / "set"}
    return reshard(*(str(word).format(**at) for word in command), *more)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("case", CASES)
def test_options_that_are_named_are_the_command_s_own(tmp_path: Path, case: str, name: str) -> None:
    """Given as the message has them, they are taken: no wrong usage."""
    CASES[case].make(tmp_path / "model")
    build(tmp_path / "whole", Spec("bf16"))
    split(tmp_path / "whole", tmp_path / "set", Cut(2))
    refused = _run(COMMANDS[name], tmp_path)
    said = f"{refused.out}\n{refused.err}"
    assert foreign_options(name, said) == []
    advised = [(of, option) for of, option in advised_options(name, said) if option[0] in CASES[case].named]
    # Where a size is asked for, or a checkpoint is read, the refusal is this case's.
    if "--pad" not in CASES[case].named or "--tp" in COMMANDS[name]:
        assert {option for _, (option, *_) in advised} == CASES[case].named
    for of, option in advised:
        assert of == name
        assert _run(COMMANDS[name], tmp_path, *option).code != 2, option


@pytest.mark.parametrize("command", ["check", "estimate"])
def test_a_config_alone_has_options_of_its_own(tmp_path: Path, command: str) -> None:
    config = json.loads((CONFIGS / "deepseek-r1.json").read_text()) | {"intermediate_size": 1088}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = (command, "--config", tmp_path / "config.json", "--tp", 2, "--scheme", "fp8_block")
    advised = list(advised_options(command, reshard(*line).out))
    mends = [option for _, option in advised if option[0] in {"--pad", "--weights", "--scheme"}]
    assert mends == [["--pad"], ["--weights", "bf16"] if command == "check" else ["--scheme", "bf16"]]
    for option in mends:
        done = reshard(*(line[:-2] if option[0] == "--scheme" else line), *option)
        assert done.code == 0, done


def test_float32_is_estimated_as_the_message_says(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp32"))
    line = ("estimate", tmp_path / "model", "--tp", 2)
    refused = reshard(*line)
    assert refused.err.endswith("estimate what it would be served as: --weights bf16\n")
    assert reshard(*line, "--weights", "bf16").code == 0
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text()) | {"torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = reshard("estimate", "--config", tmp_path / "config.json", "--tp", 2, "--format", "json").document
    right = reshard("estimate", "--config", CONFIGS / "llama-3.1-8b.json", "--tp", 2, "--format", "json").document
    assert found["schemes"] == right["schemes"]


def test_a_set_is_cut_again_by_the_command_that_is_named(tmp_path: Path) -> None:
    build(tmp_path / "model", OFFGRID)
    shards = tmp_path / "set"
    split(tmp_path / "model", shards, Cut(1, "separate"))
    for number, line in enumerate((("--tp", 2), ("--device", "npu"))):
        done = reshard("check", shards, *line)
        assert foreign_options("check", done.out) == []
        advised = [(of, option) for of, option in advised_options("check", done.out) if option[0] == "--pad"]
        assert advised == [("split", ["--pad"])], done.out
        assert reshard("split", shards, tmp_path / f"out{number}", "--tp", 2, "--pad").code == 0


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_a_set_is_cut_again_in_its_layout(tmp_path: Path, layout: str) -> None:
    """As gate and up that cannot be stacked may be kept apart."""
    build(tmp_path / "model", Spec("fp8_block", intermediate=1152))
    split(tmp_path / "model", tmp_path / "set", Cut(3, layout))
    done = reshard("check", tmp_path / "set", "--tp", "5,9")
    (advised,) = [line for line in done.out.splitlines() if "re-shards it" in line]
    command = advised.partition("reshard ")[2].removesuffix(" re-shards it").split()
    at = {"SET": tmp_path / "set", "OUT": tmp_path / "out"}
    assert reshard(*(at.get(word, word) for word in command)).code == 0
    assert reshard("check", tmp_path / "out", "--tp", "5,9").code == 0
    assert ("--layout" in command) == (layout == "separate")


@pytest.mark.parametrize("value", [2, 3, 5])
def test_a_set_s_option_names_no_size_that_the_set_cannot_be_cut_for(tmp_path: Path, value: int) -> None:
    build(tmp_path / "model", Spec("bf16"))
    split(tmp_path / "model", tmp_path / "set", Cut(4))
    setup = ("--data-parallel-size", 30, "--additional-config")
    done = reshard("check", tmp_path / "set", *setup, json.dumps({OPTION: value}))
    assert (f"cut it with reshard split --tp {value}" in done.out) == (value == 2)
    sizes = advised_sizes(done.out)
    assert sizes == ([] if value == 2 else [1, 2])
    for size in sizes:
        split(tmp_path / "set", tmp_path / f"set{size}", Cut(size))
        assert reshard("check", tmp_path / f"set{size}", *setup, json.dumps({OPTION: size})).code == 0


def _config(model: str, intermediate: int | None, folder: Path) -> Path:
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    if intermediate is not None:
        config["intermediate_size"] = intermediate
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


SIZES = st.none() | st.integers(1, 4096) | st.integers(1, 900).map(lambda blocks: 128 * blocks)


@settings(max_examples=60, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    intermediate=SIZES,
    scheme=st.sampled_from([None, "bf16", "w8a8_dynamic", "fp8_block"]),
    tp=st.integers(1, 96),
    device=st.sampled_from(["cpu", "npu"]),
    data=st.none() | st.integers(1, 24),
    tensor=st.integers(1, 4),
    option=st.none() | st.integers(1, 24),
)
def test_every_size_that_check_advises_passes_every_check(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    intermediate: int | None,
    scheme: str | None,
    tp: int,
    device: Any,
    data: int | None,
    tensor: int,
    option: int | None,
) -> None:
    path = _config(model, intermediate, tmp_path_factory.mktemp("config"))
    setup: dict[str, Any] = {}
    if data is not None:
        setup = {"data_parallel_size": data, "tensor_parallel_size": tensor}

    def wrong(tp: tuple[int, ...], option: int | None) -> list[tuple[str, str]]:
        additional = {OPTION: option} if setup and option is not None else None
        report = api.check(config=path, tp=tp, scheme=scheme, device=device, additional_config=additional, **setup)
        return [(f"{f.check} {f.where}", f.message) for f in report.findings if f.severity == "error"]

    for check, message in wrong((tp,), option):
        for size in advised_sizes(message):
            of_option = check.startswith("option") or check.endswith(f" tp {option}")
            after = wrong((), size) if setup and of_option else wrong((size,), None)
            assert after == [], f"{check}: {message}"


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    intermediate=SIZES,
    scheme=st.sampled_from([name for name in SCHEMES if name in ("bf16", "w8a8_dynamic", "fp8_block", "w8a8_static")]),
    sizes=st.sets(st.integers(1, 48), min_size=1, max_size=6),
    base=st.sampled_from([1, 2, 4]),
)
def test_every_size_that_estimate_advises_is_one_that_it_and_check_take(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    intermediate: int | None,
    scheme: str,
    sizes: set[int],
    base: int,
) -> None:
    path = _config(model, intermediate, tmp_path_factory.mktemp("config"))
    checkpoint = config_checkpoint(json.loads(path.read_text()), model, scheme)
    profile, options = load_profile("atlas-a2-376t"), Options(24, tensor_parallel_size=base)

    def of(asked: list[int]) -> Any:
        (one,) = estimate([Wanted(scheme, checkpoint, asked)], profile, options).schemes
        return one

    try:
        found = of(sorted(sizes))
    except AlignmentError:  # the engine's own size does not cut it
        return
    advised = {size for refused in found.refused for size in advised_sizes(refused.reason)}
    if found.recommended not in (None, base):  # which is what the engine has without a cut
        advised.add(found.recommended)
    for size in sorted(advised):
        assert of([size]).recommended == size
        report = api.check(config=path, tp=size, scheme=scheme, device="npu")
        assert [f.message for f in report.findings if f.severity == "error"] == []
