"""The two packages as libraries: what they give, and that the page's example runs as it stands."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import reshard
import reshard_runtime
from reshard import errors
from reshard.cli.main import app
from tests.support.builders import Spec, build
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "library.md").read_text()
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
OF_THE_COMMAND_LINE = {"form", "quiet", "debug", "strict", "paths", "dry_run"}


def example(package: str) -> str:
    """The page's example that begins with this import."""
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if package in block.split("\n")[0]
    ]
    return code


def test_all_errors_and_functions_are_there() -> None:
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(reshard.__all__) == raised | {"Manifest", "check", "merge", "split", "verify"}
    for name in reshard.__all__:
        assert getattr(reshard, name).__name__ == name
    with pytest.raises(AttributeError, match="'reshard' has no attribute 'inspekt'"):
        reshard.inspekt  # noqa: B018


@pytest.mark.parametrize("name", ["split", "verify", "merge", "check"])
def test_a_function_takes_what_its_command_takes(name: str) -> None:
    function, command = (set(inspect.signature(f).parameters) for f in (getattr(reshard, name), COMMANDS[name]))
    assert command - OF_THE_COMMAND_LINE - {"path"} <= function
    assert function - {"warn", "progress", "path"} <= command


def test_the_functions_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model", Spec("modelslim_dynamic", computable=True))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    exec(example("import reshard"), given)
    assert [shard.tp_rank for shard in given["result"].written] == [0, 1]
    assert given["manifest"].tp_size == 2
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()


def test_the_runtime_s_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank in the place of eight, on the CPU."""
    import torch
    import torch.distributed as dist

    build(tmp_path / "model", Spec("modelslim_dynamic", computable=True))
    reshard.split(tmp_path / "model", tmp_path / "r1-w8a8-tp8", 1)
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        given = {"x": torch.randn(5, 256).bfloat16()}
        code = example("import torch.distributed as dist")
        exec(code.replace('"npu:3"', '"cpu"').replace("[5, 1, 0, 7, 2, 0, 0, 1]", "[5]"), given)
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():  # the example destroys its group itself, unless it failed before
            dist.destroy_process_group()
    assert given["y"].shape == (5, 256)


def test_the_page_names_all_that_the_packages_give() -> None:
    for package in (reshard, reshard_runtime):
        for name in package.__all__:
            if not name.endswith("Error"):
                assert re.search(rf"`{name}\b", PAGE), name


def test_a_difference_is_a_result_and_a_missing_set_an_error(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    assert reshard.split(tmp_path / "model", tmp_path / "set", 2).complete
    shard = next(iter(sorted((tmp_path / "set").glob("*.safetensors"))))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = reshard.verify(tmp_path / "set")
    assert not done.ok
    assert {finding.check for finding in done.findings} == {"digest"}
    with pytest.raises(reshard.ManifestError, match="is no shard set"):
        reshard.verify(tmp_path / "model")
    with pytest.raises(reshard.SourceError, match=re.escape(shard.name)):
        reshard.merge(tmp_path / "set", tmp_path / "merged")
    with pytest.raises(reshard.OutputError, match="is the source itself"):
        reshard.split(tmp_path / "set", tmp_path / "set", 1)


def test_warnings_go_to_the_logger_unless_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "model", Spec())
    config = tmp_path / "model" / "config.json"
    config.unlink()
    heard: list[str] = []
    reshard.split(tmp_path / "model", tmp_path / "one", 2, warn=heard.append)
    assert heard
    assert not caplog.records
    reshard.split(tmp_path / "model", tmp_path / "two", 2)
    assert [record.getMessage() for record in caplog.records] == heard
