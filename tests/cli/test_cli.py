"""The command line: exit codes, what goes to stdout and what to stderr, tables, documents."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from reshard import __version__
from reshard.cli.output import Output, Table
from reshard.plan.pipeline import Cut
from tests.support.builders import RECIPES, Spec, build
from tests.support.running import TIMEOUT_SECONDS, reshard, reshard_process, split

COMMANDS = ["split", "inspect", "verify", "merge", "check", "estimate", "synth", "schema"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    return tmp_path / "model"


@pytest.fixture
def shards(model: Path, tmp_path: Path) -> Path:
    split(model, tmp_path / "shards", Cut(2))
    return tmp_path / "shards"


def test_version() -> None:
    done = reshard("--version")
    assert (done.code, done.out) == (0, f"reshard {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    """Its first line stands whole in the program's own help, too."""
    done = reshard(command, "--help")
    assert done.code == 0
    usage, _, summary, *_ = done.out.splitlines()
    assert usage.startswith("Usage: ")
    assert f"  {command:<8}  {summary.strip()}\n" in reshard("--help").out


def test_the_module_runs_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reshard", "--version"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert (done.returncode, done.stdout) == (0, f"reshard {__version__}\n")


def test_split_closes_with_a_table(model: Path, tmp_path: Path) -> None:
    done = reshard("split", model, tmp_path / "out", "--tp", 2)
    assert done.code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for shard in manifest["shards"]:
        line = next(line for line in done.out.splitlines() if shard["file"] in line)
        assert shard["blake3"][:16] in line
        assert f"{shard['size'] / 1024:.2f} KiB" in line
    whole = 2 * (3 * 512 * 256 + (512 + 512 + 256) * 8)
    largest = max(shard["size"] for shard in manifest["shards"])
    assert f"w8a8_dynamic, 2 dense layers: {whole / 1024:.2f} KiB unsplit" in done.out
    assert f"saves {(whole - largest) / 1024:.2f} KiB" in done.out
    assert "manifest.json: the set is complete" in done.out


def test_split_as_json_is_one_document(model: Path, tmp_path: Path) -> None:
    done = reshard("split", model, tmp_path / "out", "--tp", 2, "--format", "json")
    assert (done.code, done.err) == (0, "")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert done.document["shards"] == [
        {"tp_rank": s["tp_rank"], "file": s["file"], "size": s["size"], "blake3": s["blake3"], "kept": False}
        for s in manifest["shards"]
    ]
    assert done.document["complete"] is True
    assert done.document["layers"] == [0, 1]


def test_dry_run_shows_the_same_table_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    done = reshard("split", model, tmp_path / "out", "--tp", 2, "--dry-run")
    assert done.code == 0
    assert "denseffn-rank-00001-of-00002.safetensors" in done.out
    assert "nothing was written" in done.out
    assert not (tmp_path / "out").exists()
    sizes = [
        s["size"] for s in reshard("split", model, "x", "--tp", 2, "--dry-run", "--format", "json").document["shards"]
    ]
    split(model, tmp_path / "out", Cut(2))
    assert sizes == [(tmp_path / "out" / f"denseffn-rank-0000{r}-of-00002.safetensors").stat().st_size for r in (0, 1)]


def test_ranks_from_two_hosts_make_one_set(model: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    first = reshard("split", model, out, "--tp", 4, "--ranks", "0-1")
    assert first.code == 0
    assert "lacks ranks 2, 3" in first.out
    assert not (out / "manifest.json").exists()
    second = reshard("split", model, out, "--tp", 4, "--ranks", "2,3")
    assert "the set is complete" in second.out
    finished = reshard("split", model, out, "--tp", 4, "--resume")
    assert finished.code == 0
    assert finished.out.count("(kept)") == 4
    split(model, whole, Cut(4))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ("a", "'a'"),
        ("4", "0 to 3"),
        ("2-1", "2-1"),
        ("", "''"),
        ("-1", "'-1'"),
        ("0-9", "0-9"),
        ("9" * 5000, "no rank"),
    ],
)
def test_ranks_that_make_no_sense_are_wrong_usage(model: Path, tmp_path: Path, ranks: str, named: str) -> None:
    done = reshard("split", model, tmp_path / "out", "--tp", 4, f"--ranks={ranks}")
    assert done.code == 2
    assert named in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("split",),
        ("split", "a", "b"),
        ("split", "a", "b", "--tp", "two"),
        ("split", "a", "b", "--tp", "2", "--weights", "int4"),
        ("split", "a", "b", "--tp", "2", "--layout", "odd"),
        ("split", "a", "b", "--tp", "2", "--resume", "--overwrite"),
        ("split", "a", "b", "--tp", "2", "--workers", "0"),
        ("inspect", "a", "--format", "xml"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    assert reshard(*arguments).code == 2


def test_an_expected_error_is_one_line(tmp_path: Path) -> None:
    done = reshard_process("split", tmp_path / "nowhere", tmp_path / "out", "--tp", 2)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"error: {tmp_path / 'nowhere'}: no such folder; give the one that holds the checkpoint\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = reshard_process("inspect", tmp_path / "nowhere", "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "SourceError" in done.err


def test_an_error_as_json_is_a_document_too(tmp_path: Path) -> None:
    done = reshard("inspect", tmp_path / "nowhere", "--format", "json")
    assert done.code == 1
    assert done.document["error"]["kind"] == "SourceError"
    assert done.document["error"]["message"].startswith(f"{tmp_path / 'nowhere'}: no such folder")


def test_an_interruption_is_exit_130(model: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of writing: no temporary file stays, and the next run may go on."""
    interrupt = """
import os
write, calls = os.pwrite, []
def pwrite(*arguments):
    calls.append(1)
    if len(calls) == 2:
        import _thread; _thread.interrupt_main()
    return write(*arguments)
os.pwrite = pwrite
"""
    done = reshard_process("split", model, tmp_path / "out", "--tp", 4, before=interrupt)
    assert done.code == 130
    assert "Traceback" not in done.err
    left = {path.name for path in (tmp_path / "out").glob("*")} if (tmp_path / "out").exists() else set()
    assert not {name for name in left if name.endswith(".tmp") or name == "manifest.json"}
    assert reshard("split", model, tmp_path / "out", "--tp", 4, "--resume").code == 0


def test_inspect_names_every_tensor_and_its_place(model: Path) -> None:
    done = reshard("inspect", model)
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if "layers.1.mlp.down_proj.weight_scale" in line)
    assert "w8a8_dynamic" in line
    assert "[256, 1]" in line
    assert ".safetensors @ " in line
    document = reshard("inspect", model, "--format", "json").document
    assert document["scheme"] == "w8a8_dynamic"
    assert document["part_bytes"] == 2 * (3 * 512 * 256 + (512 + 512 + 256) * 8)
    part = document["layers"][0]["linears"]["up_proj"]["tensors"][0]["parts"][0]
    raw = (model / part["file"]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["model.layers.0.mlp.up_proj.weight"]
    assert part["offset"] == 8 + length + entry["data_offsets"][0]


def test_inspect_shows_a_shard_set(shards: Path) -> None:
    document = reshard("inspect", shards, "--format", "json").document
    assert document["shard_set"]["tp_size"] == 2
    assert document["source"]["name"] == "model"
    assert "tp_size 2, fused layout" in reshard("inspect", shards).out


def test_verify_says_what_holds(model: Path, shards: Path) -> None:
    done = reshard("verify", shards, "--source", model)
    assert done.code == 0
    assert "2 shards, 24 tensors" in done.out
    document = reshard("verify", shards, "--source", model, "--format", "json").document
    assert document["ok"] is True
    assert document["findings"] == []
    assert len(document["layers"]) == 2


def test_verify_lists_what_differs_and_ends_with_3(shards: Path) -> None:
    first, second = (shards / f"denseffn-rank-0000{rank}-of-00002.safetensors" for rank in (0, 1))
    data = bytearray(first.read_bytes())
    data[4096] ^= 1
    first.write_bytes(data)
    second.unlink()
    (shards / "config.json").write_text("{}")
    done = reshard("verify", shards)
    assert done.code == 3
    lines = done.out.splitlines()
    assert [
        line for line in lines if line.startswith(f"digest: {first.name}: model.layers.0.mlp.gate_up_proj.weight: ")
    ]
    assert [line for line in lines if line.startswith(f"digest: {first.name}: BLAKE3 is ")]
    assert [line for line in lines if line.startswith(f"file: {second.name}: manifest.json names it and it is missing")]
    assert [line for line in lines if line.startswith("size: config.json: 2 bytes, manifest.json says ")]
    document = reshard("verify", shards, "--format", "json").document
    assert {finding["check"] for finding in document["findings"]} == {"digest", "file", "size"}


def test_verify_sees_a_header_that_was_changed(shards: Path) -> None:
    path = shards / "denseffn-rank-00000-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"I8"', b'"U8"', 1))
    done = reshard("verify", shards)
    assert done.code == 3
    assert "is U8 " in done.out


def test_verify_sees_a_shard_of_another_rank(shards: Path) -> None:
    first, second = (shards / f"denseffn-rank-0000{rank}-of-00002.safetensors" for rank in (0, 1))
    first.write_bytes(second.read_bytes())
    done = reshard("verify", shards)
    assert done.code == 3
    assert "its header says tp_rank '1', manifest.json says '0'" in done.out


def test_warnings_go_to_stderr(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    (tmp_path / "model" / "config.json").unlink()
    done = reshard("inspect", tmp_path / "model")
    assert done.code == 0
    assert done.err.startswith("warning: no config.json")


def test_quiet_and_pipes(model: Path, tmp_path: Path) -> None:
    """Without a terminal progress is plain lines on stderr; --quiet leaves none."""
    loud = reshard("split", model, tmp_path / "loud", "--tp", 2)
    assert "split: " in loud.err
    assert "\x1b" not in loud.err + loud.out
    assert reshard("split", model, tmp_path / "quiet", "--tp", 2, "--quiet").err == ""


@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("command", ["inspect", "check", "verify"])
def test_what_stdout_cannot_take_is_an_error(shards: Path, command: str, form: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "reshard", command, shards, "--format", form],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    assert done.returncode == 1
    *progress, error = done.stderr.decode().splitlines()
    assert error == "error: stdout: No space left on device: what was to be written there is lost"
    assert len(progress) == (command == "verify" and form == "human")


def test_a_table_shows_whole_cells_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(("file", ">size"), [["x" * 300, "1 B"]])
    Output("human", quiet=True, debug=False).document({}, lambda: [table])
    assert f"{'x' * 300}    1 B\n" in capsys.readouterr().out


def test_a_terminal_gets_a_bar(model: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "reshard", "split", model, tmp_path / "out", "--tp", "2"],
            stdout=subprocess.PIPE,
            stderr=follower,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, "TERM": "xterm-256color"},
            check=True,
        )
        shown = os.read(leader, 1 << 16).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert "split" in shown
    assert "\x1b[" in shown
    assert b"the set is complete" in done.stdout


@pytest.mark.parametrize("recipe", ["fp8_block", "bf16"])
@pytest.mark.parametrize("quant_format", ["modelslim", "compressed-tensors"])
def test_conversion_from_the_command_line(tmp_path: Path, recipe: str, quant_format: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    arguments = ("--weights", "w8a8", "--quant-format", quant_format)
    done = reshard("split", tmp_path / "model", tmp_path / "out", "--tp", 2, *arguments)
    assert done.code == 0, done.err
    assert reshard("verify", tmp_path / "out", "--source", tmp_path / "model").code == 0
    assert reshard("merge", tmp_path / "out", tmp_path / "merged").code == 0
    document = reshard("inspect", tmp_path / "merged", "--format", "json").document
    assert document["scheme"] == "w8a8_dynamic"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_splits_verifies_and_merges(tmp_path: Path, recipe: str) -> None:
    build(tmp_path / "model", Spec(recipe))
    assert reshard("split", tmp_path / "model", tmp_path / "out", "--tp", 4, "--quiet").code == 0
    done = reshard("verify", tmp_path / "out", "--source", tmp_path / "model", "--quiet")
    assert done.code == 0, done.out
    assert reshard("merge", tmp_path / "out", tmp_path / "merged", "--quiet").code == 0
    # What was merged proves the shards as the original does.
    assert reshard("split", tmp_path / "merged", tmp_path / "again", "--tp", 4, "--quiet").code == 0
    for rank in range(4):
        name = f"denseffn-rank-0000{rank}-of-00004.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
