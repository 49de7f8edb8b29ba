"""What people plug `reshard check` in with: the GitHub Action, the pre-commit hooks, the pytest fixture.

Their services are not here. The commands in their files are run for real; the files are held against the schemas that
GitHub and pre-commit themselves go by.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reshard.checks.report import Report
from reshard.errors import UsageError
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build
from tests.support.paths import CONFIGS, ROOT
from tests.support.running import TIMEOUT_SECONDS, reshard, split

pytest_plugins = ["pytester"]

BIN = Path(sys.executable).parent
R1 = CONFIGS / "deepseek-r1.json"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **environment},
        check=False,
    )


# The GitHub Action.


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return loaded


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("actions", "action.yml"),
        ("workflows", ".github/workflows/*.yml"),
        ("issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
    ],
)
def test_files_for_github_are_some_by_its_schemas(kind: str, files: str) -> None:
    found = sorted(ROOT.glob(files))
    assert found
    done = run(BIN / "check-jsonschema", "--builtin-schema", f"vendor.github-{kind}", *found)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_input_is_used_and_every_use_is_an_input(action: dict[str, Any]) -> None:
    steps = action["runs"]["steps"]
    said = {value for step in steps for value in step["env"].values()}
    used = {value[len("${{ inputs.") : -len(" }}")] for value in said if value.startswith("${{ inputs.")}
    assert used == set(action["inputs"])
    assert all("${{" not in step["run"] for step in steps), "an input in a script would be run as a command"


def step(action: dict[str, Any], program: Path = BIN / "reshard", **inputs: str) -> subprocess.CompletedProcess[str]:
    """The action's last step, as a runner starts it: bash, and the inputs or their defaults in the environment."""
    last = action["runs"]["steps"][-1]
    assert not inputs.keys() - {key.replace("-", "_") for key in action["inputs"]}
    environment = {"RESHARD": str(program)}
    for variable, value in last["env"].items():
        name = value[len("${{ inputs.") : -len(" }}")]
        if name in action["inputs"]:
            environment[variable] = inputs.get(name.replace("-", "_"), action["inputs"][name].get("default", ""))
    return run("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", last["run"], **environment)


def test_the_action_passes_and_fails_as_the_command(action: dict[str, Any]) -> None:
    right = step(action, paths=str(R1), tp="8,16")
    assert (right.returncode, right.stdout) == (0, "7 checks: 7 ok\n")
    wrong = step(action, paths=f"{R1}\n{CONFIGS / 'llama-3.1-8b.json'}\n", tp="5")
    assert wrong.returncode == 3
    assert wrong.stdout.count("::error file=") == 2
    assert step(action, paths="/none").returncode == 1
    assert step(action, paths="\n").returncode == 2


def test_the_action_hands_every_input_on(action: dict[str, Any], tmp_path: Path) -> None:
    """What the step starts is written down, and run here."""
    noting = tmp_path / "reshard"
    noting.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {tmp_path}/arguments\n")
    noting.chmod(0o755)

    def code(**inputs: str) -> int:
        done = step(action, noting, **inputs)
        assert done.returncode == 0, done.stderr
        return reshard(*(tmp_path / "arguments").read_text().split("\0")[:-1]).code

    option = json.dumps({"denseffn_tensor_parallel_size": 32})
    sizes = {"data_parallel_size": "64", "tensor_parallel_size": "1"}
    given = {"paths": str(R1), "tp": "32", "additional_config": option, "pad": "true", **sizes}
    assert code(**given) == 0
    assert code(**{**given, "pad": "false"}) == 3
    assert code(**{**given, "pad": "false", "weights": "w8a8"}) == 0
    assert code(**{**given, "tensor_parallel_size": "3"}) == 3
    assert code(**{**given, "data_parallel_size": "8"}) == 3
    ascends = {"paths": str(R1), "additional_config": '{"finegrained_tp_config": {"mlp_tensor_parallel_size": 1}}'}
    assert code(**ascends, pipeline_parallel_size="2") == 0
    ascends["additional_config"] = ascends["additional_config"].replace("1", "2")
    assert code(**ascends, data_parallel_size="2") == 0
    assert code(**ascends, data_parallel_size="2", pipeline_parallel_size="2") == 3
    ascends["additional_config"] = ascends["additional_config"].replace("mlp", "oproj")
    assert code(**ascends, data_parallel_size="2", kv_role="kv_consumer") == 0
    assert code(**ascends, data_parallel_size="2", kv_role="kv_producer") == 3
    assert code(**ascends, data_parallel_size="2", kv_role="kv_consumer", enforce_eager="true") == 3
    assert code(paths=str(R1), scheme="bf16", tp="32") == 0
    assert code(paths=str(R1), tp="8", device="npu") == 0
    assert code(paths=str(R1), tp="8", device="npu", strict="true") == 3
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "a set", Cut(2))
    assert code(paths=str(tmp_path / "a set"), against=str(tmp_path / "model")) == 0
    assert code(paths=str(tmp_path / "a set"), against=str(tmp_path / "none")) == 1


def test_the_action_writes_junit_as_well(action: dict[str, Any], tmp_path: Path) -> None:
    done = step(action, paths=str(R1), tp="5", junit=str(tmp_path / "out.xml"))
    assert done.returncode == 3
    assert '<failure type="divides"' in (tmp_path / "out.xml").read_text()
    assert "::error " in done.stdout


@pytest.mark.parametrize("junit", ["none/out.xml", "/dev/full"])
@pytest.mark.parametrize(("tp", "code"), [("8", 1), ("5", 3)])
def test_the_action_fails_where_junit_cannot_be_written(
    action: dict[str, Any], tmp_path: Path, junit: str, tp: str, code: int
) -> None:
    done = step(action, paths=str(R1), tp=tp, junit=str(tmp_path / junit))
    assert done.returncode == code
    last = done.stdout.splitlines()[-1]
    assert last == f"::error title=reshard check::input junit: {tmp_path / junit} cannot be written"


@pytest.mark.parametrize(
    ("strict", "code"), [("true", 3), ("TRUE", 3), ("Yes", 3), ("on", 3), ("FALSE", 0), ("no", 0), ("Off", 0), ("", 0)]
)
def test_switches_are_true_or_false(action: dict[str, Any], strict: str, code: int) -> None:
    assert step(action, paths=str(R1), tp="8", device="npu", strict=strict).returncode == code


@pytest.mark.parametrize("name", ["strict", "pad"])
@pytest.mark.parametrize(
    ("value", "shown"), [("truth", "truth"), ("1", "1"), ("x\n::error::50%", "$'x\\n::error::50%25'")]
)
def test_any_other_value_of_a_switch_is_refused(action: dict[str, Any], name: str, value: str, shown: str) -> None:
    strict, pad = (value, "") if name == "strict" else ("", value)
    done = step(action, paths=str(R1), tp="8", strict=strict, pad=pad)
    expected = f"::error title=reshard check::input {name}: expected true or false, got {shown}\n"
    assert (done.returncode, done.stdout) == (2, expected)


def test_an_input_is_never_a_command_or_an_option(action: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for paths in (f"$(touch {mark})", f"; touch {mark}", f"`touch {mark}`", "--version"):
        done = step(action, paths=paths, tp="8")
        assert done.returncode == 1, done.stdout
        assert "no such folder" in done.stderr
    assert not mark.exists()


# The pre-commit hooks.


@pytest.fixture(scope="module")
def hooks() -> dict[str, dict[str, Any]]:
    return {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


def test_the_hooks_are_some_by_pre_commit_itself() -> None:
    for command, file in (
        ("validate-manifest", ".pre-commit-hooks.yaml"),
        ("validate-config", ".pre-commit-config.yaml"),
    ):
        done = run(BIN / "pre-commit", command, ROOT / file)
        assert done.returncode == 0, done.stdout


def hook(entry: dict[str, Any], arguments: list[str], files: list[Path]) -> int:
    """As pre-commit starts a hook: its entry's words, the user's args, then the files, if it passes any."""
    program, *rest = shlex.split(entry["entry"])
    named = files if entry.get("pass_filenames", True) else []
    return run(BIN / program, *rest, *arguments, *named).returncode


def test_the_config_hook_takes_any_number_of_files(hooks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    files = []
    for name in ("deepseek-r1", "glm-4.5", "kimi-k2"):
        files.append(tmp_path / name / "config.json")
        files[-1].parent.mkdir()
        files[-1].write_text((CONFIGS / f"{name}.json").read_text())
    assert hook(hooks["reshard-check-config"], ["--tp", "8,16"], files) == 0
    assert hook(hooks["reshard-check-config"], ["--tp", "5"], files) == 3


def test_the_other_hook_takes_what_args_give(hooks: dict[str, dict[str, Any]]) -> None:
    assert hook(hooks["reshard-check"], [str(R1), "--tp", "8"], [Path("ignored.json")]) == 0
    assert hook(hooks["reshard-check"], [str(R1), "--tp", "32"], [Path("ignored.json")]) == 3


def test_the_config_hook_is_for_config_json(hooks: dict[str, dict[str, Any]]) -> None:
    wanted = re.compile(hooks["reshard-check-config"]["files"])
    assert all(wanted.search(path) for path in ("config.json", "models/r1/config.json"))
    assert not any(wanted.search(path) for path in ("generation_config.json", "tokenizer.json", "config.jsonl"))


# The pytest fixture.


@pytest.mark.slow
def test_the_fixture_passes_fails_and_says_why(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        f"""
        R1 = {str(R1)!r}

        def test_right(reshard_check):
            report = reshard_check(config=R1, tp=(8, 16))
            assert (report.kind, len(report.of("ok"))) == ("config", 7)

        def test_wrong(reshard_check):
            reshard_check(config=R1, tp=32)

        def test_warned(reshard_check):
            reshard_check(config=R1, tp=8, device="npu")

        def test_strict(reshard_check):
            reshard_check(config=R1, tp=8, device="npu", strict=True)

        def test_setup(reshard_check):
            reshard_check(config=R1, additional_config={{"denseffn_tensor_parallel_size": 3}}, data_parallel_size=16)

        def test_unreadable(reshard_check):
            reshard_check("nowhere")
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=4)
    result.stdout.fnmatch_lines(
        [
            "reshard check *deepseek-r1.json:",
            "blocks: tp 32: *576 rows, not a multiple of the 128-row scale block*",
            "kernels: no NPU kernel multiplies fp8_block*",
            "option-size: denseffn_tensor_parallel_size is 3; with data-parallel size 16 it may be 1, 2, 4, 8 or 16",
            "*SourceError: nowhere: no such folder*",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tp": 0}, "tp 0: a group size is a whole number from 1 to 99999"),
        ({"tp": "8,16"}, "tp '8': a group size is a whole number"),
        ({"tp": 8, "device": "gpu"}, "device 'gpu': there are cpu, npu"),
        ({"tp": 8, "weights": "int8"}, "weights 'int8': there are keep, bf16, w8a8"),
        ({"data_parallel_size": 0}, "data-parallel size: expected a whole number from 1 to 99999, got 0"),
        ({"tensor_parallel_size": "2"}, "tensor-parallel size: expected a whole number from 1 to 99999, got '2'"),
        ({"pipeline_parallel_size": True}, "pipeline-parallel size: expected a whole number from 1 to 99999, got True"),
        ({"kv_role": "consumer"}, "kv role 'consumer': there are kv_producer, kv_consumer, kv_both"),
        ({"enforce_eager": 1}, "enforce eager: expected true or false, got 1"),
        ({"additional_config": "{}"}, "additional config: expected a mapping of options, got '{}'"),
    ],
)
def test_a_value_that_is_none_is_refused(
    reshard_check: Callable[..., Report], arguments: dict[str, Any], says: str
) -> None:
    """A slip that were taken for a default would be a check that was never made."""
    with pytest.raises(UsageError, match=re.escape(says)):
        reshard_check(config=R1, **arguments)


def test_a_set_in_the_fixture(pytester: pytest.Pytester, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    pytester.makepyfile(
        f"""
        from pathlib import Path

        def test_set(reshard_check):
            folder = Path({str(tmp_path)!r})
            assert reshard_check(folder / "set", tp=2, against=folder / "model").kind == "shard set"
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


def test_the_plugin_costs_nothing_where_it_is_not_used(pytester: pytest.Pytester) -> None:
    """pytest loads it in every project of the environment: beyond its own module nothing may come with it."""
    pytester.makepyfile(
        """
        import sys

        def test_nothing(request):
            assert request.config.pluginmanager.has_plugin("reshard")
            ours = {name for name in sys.modules if name.split(".")[0] in ("reshard", "reshard_runtime")}
            assert ours == {"reshard", "reshard.checks", "reshard.checks.pytest_plugin"}
            assert not {"torch", "numpy", "pydantic", "typer", "blake3"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest").assert_outcomes(passed=1)
