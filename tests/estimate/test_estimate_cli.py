"""`reshard estimate` from the command line: table, chart, picture, document, wrong usage."""

import contextlib
import fcntl
import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
import termios
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from reshard.estimate.profile import load_profile
from tests.support.builders import Spec, build
from tests.support.paths import ROOT
from tests.support.running import reshard, reshard_process

CONFIG = ROOT / "configs" / "deepseek-r1.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    return tmp_path / "model"


def test_a_config_alone() -> None:
    done = reshard("estimate", "--config", CONFIG, "--tp", "16,1,8", "--scheme", "w8a8")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(
        "deepseek-r1 on Atlas A2 376T: hidden_size 7168, intermediate_size 18432, 3 dense layers"
    )
    rows = [line.split() for line in lines if line.startswith("w8a8_dynamic  ")]
    assert rows == [
        ["w8a8_dynamic", "1", "1.108", "0.000", "0", "-", "0", "1.169", "-", "yes", "yes"],
        ["w8a8_dynamic", "8", "0.139", "0.970", "200,704", "150,556", "14", "0.579", "0.571", "yes", "yes"],
        ["w8a8_dynamic", "16", "0.069", "1.039", "430,080", "322,620", "8", "2.016", "1.592", "yes", "yes"],
    ]
    bars = [line for line in lines if line.startswith("w8a8_dynamic tp")]
    assert [line.split()[-2:] for line in bars[:1]] == [["1.169", "ms"]]
    assert bars[1].endswith("0.571 ms recommended")
    assert lines[-3:] == [
        "w8a8_dynamic: choose tp 8",
        "  0.571 ms a step, 1.169 ms unsplit; a device holds 0.139 GiB and saves 0.970",
        "  tp 16 takes 1.592 ms: gather and scatter take 1.053 ms more, over the cluster (25 GB/s, 1.5 us) and not the "
        "node (196 GB/s, 5.5 us)",
    ]


def test_bars_are_as_long_as_their_times() -> None:
    done = reshard("estimate", "--config", CONFIG, "--tp", "1,8,16", "--scheme", "bf16")
    bars = [line for line in done.out.splitlines() if line.startswith("bf16 tp")]
    cells = [sum(line.count(glyph) for glyph in "█▓▒░") for line in bars[:3]]
    assert cells == [60, round(60 * 0.714 / 2.289), round(60 * 2.132 / 2.289)]


def _in_a_terminal(columns: int, terminal: str) -> list[str]:
    """The lines of an estimate on a terminal so wide, without colours and bold."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "reshard", "estimate", "--config", CONFIG, "--tp", "1,8,16"],
            stdout=follower,
            env={key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": terminal},
        ) as process:
            os.close(follower)
            shown = b""
            with contextlib.suppress(OSError):  # Linux says EIO where the other end is closed
                while piece := os.read(leader, 1 << 16):
                    shown += piece
        assert process.returncode == 0
    finally:
        os.close(leader)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()


@pytest.mark.parametrize(("columns", "terminal"), [(60, "xterm"), (80, "dumb"), (200, "xterm-256color")])
def test_a_narrow_terminal_gets_shorter_bars_and_whole_figures(columns: int, terminal: str) -> None:
    lines = _in_a_terminal(columns, terminal)
    row = ["w8a8_dynamic", "16", "0.069", "1.039", "430,080", "322,620", "8", "2.016", "1.592", "yes", "yes"]
    assert [line.split() for line in lines if line.startswith("w8a8_dynamic  ")][-1] == row
    bars = [line for line in lines if " tp " in line and "█" in line]
    assert len(bars) == 6
    assert max(len(line) for line in bars) <= columns
    assert max(line.count("█") for line in bars) == min(60, columns - len("w8a8_dynamic tp 1     2.289 ms recommended"))
    legend = lines[lines.index(bars[-1]) + 1]
    assert legend.split()[:2] == ["█", "matmuls"]
    assert len(legend) <= columns


def test_where_the_locale_has_no_blocks_bars_are_ascii() -> None:
    done = reshard_process("estimate", "--config", CONFIG, "--tp", "5,8", PYTHONIOENCODING="ascii")
    assert (done.code, done.err) == (0, "")
    assert "# matmuls  + quantize, SwiGLU, copies  = all_gather  - reduce_scatter" in done.out
    assert "24, 32, \\u2026; or --pad" in done.out


def test_the_defaults_of_a_config_and_of_a_checkpoint(model: Path) -> None:
    document = reshard("estimate", "--config", CONFIG, "--tp", 8, "--format", "json").document
    assert [one["scheme"] for one in document["schemes"]] == ["bf16", "w8a8_dynamic"]
    document = reshard("estimate", model, "--tp", "1,2", "--format", "json").document
    assert [one["scheme"] for one in document["schemes"]] == ["w8a8_dynamic"]
    assert document["source"] == "model"
    assert document["schemes"][0]["unsplit_bytes"] == 2 * (3 * 512 * 256 + (512 + 512 + 256) * 8)


def test_a_checkpoint_is_compared_with_what_it_would_be_converted_to(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block"))
    arguments = ("estimate", tmp_path / "model", "--tp", "1,2", "--format", "json")
    weights = 2 * 3 * 512 * 256
    document = reshard(*arguments, "--weights", "keep,bf16,w8a8").document
    assert [(one["scheme"], one["unsplit_bytes"]) for one in document["schemes"]] == [
        ("fp8_block", 2 * weights),
        ("bf16", 2 * weights),
        ("w8a8_dynamic", weights + 2 * (512 + 512 + 256) * 8),
    ]
    done = reshard(*arguments, "--weights", "int4")
    assert (done.code, done.err) == (2, "error: --weights int4: there are keep, bf16, w8a8\n")


def test_the_scheme_of_a_checkpoint_that_says_none(model: Path) -> None:
    """As split takes it."""
    (model / "quant_model_description.json").unlink()
    assert reshard("estimate", model, "--tp", 2).code == 1
    document = reshard("estimate", model, "--tp", 2, "--scheme", "w8a8_dynamic", "--format", "json").document
    assert [one["scheme"] for one in document["schemes"]] == ["w8a8_dynamic"]
    done = reshard("estimate", model, "--tp", 2, "--scheme", "int3")
    assert done.code == 2
    assert done.err.startswith("error: --scheme: unknown scheme int3; supported are bf16, ")


def test_the_document_has_everything() -> None:
    arguments = ("--config", CONFIG, "--tp", "1,5,8,32", "--scheme", "fp8_block,w8a8_dynamic", "--batch", 12)
    document = reshard("estimate", *arguments, "--format", "json").document
    assert (document["batch"], document["layers"]) == (12, [0, 1, 2])
    assert document["device"] == load_profile("atlas-a2-376t").model_dump(exclude_none=True)
    fp8, w8a8 = document["schemes"]
    assert [refused["tp_size"] for refused in fp8["refused"]] == [5, 32]
    assert [size["tp_size"] for size in w8a8["sizes"]] == [1, 8, 32]
    eight = w8a8["sizes"][1]
    assert eight["network"] == "node"
    assert eight["alignment"] == {"tiles": True, "blocks": True, "too_wide": False, "notes": []}
    assert eight["gathered_as_int8"]["gather_bytes_per_token_layer"] == 7 * 7172
    assert eight["gathered_as_bf16"]["gather_bytes_per_token_layer"] == 7 * 2 * 7168
    assert eight["gathered_as_int8"]["messages_per_layer"] == 14
    assert eight["gathered_as_int8"]["messages_per_token_layer"] == pytest.approx(14 / 12)
    assert eight["gathered_as_int8"]["step_seconds"] == pytest.approx(
        sum(eight["gathered_as_int8"]["seconds"].values())
    )
    assert fp8["sizes"][0]["gathered_as_int8"] is None
    assert w8a8["recommended"] == 8
    assert "fp8_block: no kernel multiplies it as it is; held and run as BF16" in document["notes"]
    assert any("--reduce-dtype float32" in note for note in document["notes"])


def test_options_reach_the_estimate() -> None:
    def step(*more: object) -> float:
        arguments = ("estimate", "--config", CONFIG, "--tp", 8, "--scheme", "bf16", "--format", "json", *more)
        done = reshard(*arguments)
        assert done.code == 0, done.err
        seconds: float = done.document["schemes"][0]["sizes"][0]["gathered_as_bf16"]["step_seconds"]
        return seconds

    plain = step()
    assert step("--batch", 240) > plain
    assert step("--reduce-dtype", "float32") > plain
    assert step("--device", "atlas-a3-752t") != plain
    static = step("--set", "static.collective_us=20", "--set", "static.matmul_us=0")
    assert static == pytest.approx(plain + 3 * (2 * 10e-6 - 2 * 5e-6))


def test_fixed_rows() -> None:
    arguments = ("estimate", "--config", CONFIG, "--tp", "1,8", "--scheme", "w8a8,bf16", "--max-tokens", 64)
    done = reshard(*arguments)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith("3 dense layers, 24 tokens a rank and step in 64 rows")
    assert "fixed rows: every rank sends 64 for its 24 tokens" in lines
    rows = [line.split() for line in lines if line.startswith(("w8a8_dynamic  ", "bf16   ")) and " tp " not in line]
    assert rows[1][4:9] == ["535,211", "401,483", "14", "0.927", "0.875"]
    assert [" ".join(row) for row in rows[4:]] == [
        "w8a8_dynamic 8 512 320 3,213,056 1,204,896 6,422,528 2,408,448 0.292 0.190 0.875 0.571",
        "bf16 8 512 320 6,422,528 2,408,448 6,422,528 2,408,448 0.415 0.238 1.246 0.714",
    ]
    document = reshard(*arguments, "--format", "json").document
    assert (document["batch"], document["max_tokens"], document["tensor_parallel_size"]) == (24, 64, 1)
    one, eight = document["schemes"][0]["sizes"]
    assert one["fixed_rows"] is None
    cost = eight["fixed_rows"]
    assert cost["unneeded_rows_per_layer"] == 320
    assert {key: value for key, value in cost["exact"].items() if key.endswith("_per_layer")} == {
        "rows_per_layer": 192,
        "gather_bytes_per_layer": 1_204_896,
        "exchange_bytes_per_layer": 0,
        "scatter_bytes_per_layer": 2_408_448,
        "messages_per_layer": 14,
    }
    assert cost["fixed"]["step_seconds"] == eight["gathered_as_int8"]["step_seconds"]
    assert cost["fixed"]["layer_seconds"] == pytest.approx(cost["fixed"]["step_seconds"] / 3)
    assert eight["gathered_as_int8"]["gather_bytes_per_token_layer"] == round(3_213_056 / 24)
    plain = reshard(*arguments[:-2], "--format", "json").document
    assert (plain["max_tokens"], plain["schemes"][0]["sizes"][1]["fixed_rows"]) == (None, None)
    assert "fixed rows" not in reshard(*arguments[:-2]).out


def test_a_group_over_tensor_parallel_ranks_too() -> None:
    arguments = ("--config", CONFIG.with_name("kimi-k2.json"), "--scheme", "w8a8", "--tensor-parallel-size", 4)
    done = reshard("estimate", *arguments, "--tp", "4,6,16")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith("1 dense layer, 24 tokens a rank and step, tensor-parallel size 4")
    assert [line.split()[1:9] for line in lines if line.startswith("w8a8_dynamic  ")] == [
        ["4", "0.092", "0.000", "21,504", "-", "6", "0.160", "-"],
        ["16", "0.023", "0.069", "107,520", "86,028", "10", "0.233", "0.210"],
    ]
    assert "w8a8_dynamic tp 6: not possible: it counts tensor-parallel ranks, too: expected a multiple of 4" in lines
    document = reshard("estimate", *arguments, "--tp", 8, "--format", "json").document
    assert document["tensor_parallel_size"] == 4
    (scheme,) = document["schemes"]
    weights, scales, hidden = 3 * 7168 * 18432, 2 * 18432 * 8, 7168 * 8
    assert scheme["unsplit_bytes"] == (weights + scales) // 4 + hidden
    assert scheme["sizes"][0]["saved_bytes"] == (weights + scales) // 8


def test_a_batch_beyond_counting_is_wrong_usage() -> None:
    done = reshard("estimate", "--config", CONFIG, "--tp", 8, "--batch", 10**400)
    assert (done.code, done.out) == (2, "")


def test_padding_lets_any_size_be() -> None:
    arguments = ("estimate", "--config", CONFIG, "--tp", "32", "--scheme", "fp8_block", "--pad")
    document = reshard(*arguments, "--format", "json").document
    (size,) = document["schemes"][0]["sizes"]
    assert (size["share"], size["padded"]) == (640, True)
    assert "32 padded" in reshard(*arguments).out


def test_a_profile_of_one_s_own(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "hardware" / "atlas-a2-376t.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("Atlas A2 376T", "Mine"))
    done = reshard("estimate", "--config", CONFIG, "--tp", 8, "--device", tmp_path / "mine.toml")
    assert done.out.startswith("deepseek-r1 on Mine: ")


def test_the_picture(tmp_path: Path) -> None:
    """A rectangle for each kind of work, and what is held and saved; as long as the figures are."""
    done = reshard("estimate", "--config", CONFIG, "--tp", "1,8", "--scheme", "w8a8", "--svg", tmp_path / "e.svg")
    assert done.code == 0
    root = ET.fromstring((tmp_path / "e.svg").read_text())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"deepseek-r1 on Atlas A2 376T", "w8a8_dynamic", "tp 1", "tp 8", "1.169", "0.571 recommended"} <= set(texts)
    widths: dict[str | None, list[float]] = {}
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("height") == "18":
            widths.setdefault(rect.get("fill"), []).append(float(rect.get("width", "nan")))
    assert widths["#0f766e"] == pytest.approx([190, 190 * 0.139 / 1.108], abs=0.5)
    assert widths["#99f6e4"] == pytest.approx([190 * 0.970 / 1.108], abs=0.5)
    time = {kind: sum(values) for kind, values in widths.items()}
    assert sum(time[kind] for kind in ("#2563eb", "#7c3aed", "#d97706", "#b91c1c")) == pytest.approx(
        380 * (1 + 0.571 / 1.169), abs=0.5
    )


def test_the_picture_that_the_readme_shows_is_what_is_drawn(tmp_path: Path) -> None:
    done = reshard("estimate", "--config", CONFIG, "--tp", "1,2,4,8,16", "--svg", tmp_path / "e.svg")
    assert done.code == 0
    assert (tmp_path / "e.svg").read_bytes() == (ROOT / "docs" / "estimate.svg").read_bytes()


def test_the_picture_s_texts_do_not_reach_the_next_bars(tmp_path: Path) -> None:
    """Where the longest bar is the recommended one. A bold letter or figure of 14 pixels is 9.5 wide."""
    arguments = ("--config", CONFIG, "--tp", "16", "--scheme", "bf16", "--batch", 100_000)
    assert reshard("estimate", *arguments, "--svg", tmp_path / "e.svg").code == 0
    root = ET.fromstring((tmp_path / "e.svg").read_text())
    (text,) = [t for t in root.iter(f"{SVG}text") if (t.text or "").endswith(" recommended")]
    assert text.text == "8364.349 recommended"
    assert float(text.get("x", "nan")) + 9.5 * len(text.text) < 690


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    done = reshard("estimate", "--config", CONFIG, "--tp", 8, "--svg", tmp_path / "no" / "e.svg")
    assert done.code == 1
    assert "e.svg: cannot be written: No such file or directory" in done.err


def test_any_model_s_config_will_do(tmp_path: Path) -> None:
    """Also of a family whose other tensors' names are not known here."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "new", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}'
    )
    done = reshard("estimate", "--config", tmp_path / "config.json", "--tp", "1,2", "--format", "json")
    assert done.document["layers"] == [0, 1]
    assert done.document["schemes"][0]["unsplit_bytes"] == 2 * 3 * 512 * 1024 * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to estimate: give a PATH, or --config FILE"),
        (("x", "--config", CONFIG, "--tp", 8), 2, "PATH and --config FILE: give one of them"),
        (("--config", CONFIG), 2, "--tp is missing: give the group sizes to compare, such as --tp 1,2,4,8"),
        (("--config", CONFIG, "--tp", "8,"), 2, "--tp 8,: '' is no group size"),
        (("--config", CONFIG, "--tp", "8,zero"), 2, "--tp 8,zero: 'zero' is no group size"),
        (("--config", CONFIG, "--tp", "0"), 2, "--tp 0: '0' is no group size"),
        (
            ("--config", CONFIG, "--tp", "8", "--set", "speed=1"),
            2,
            "--set speed=1: expected KEY=VALUE, such as ",
        ),
        (("--config", CONFIG, "--tp", "9" * 5000), 2, "--tp 9999999"),
        (
            ("--config", CONFIG, "--tp", "8", "--set", "compute.bf16_tflops=1e-310"),
            1,
            "--set: compute.bf16_tflops: Input should be greater than or equal to 0.000000001 (got '1e-310')",
        ),
        (("--measure", "--tp", "8"), 2, "--measure prints this machine's profile and takes no PATH"),
        (
            ("--config", CONFIG, "--tp", "8", "--max-tokens", 23),
            2,
            "--max-tokens 23: every rank sends so many rows, and --batch gives it 24 tokens; give --max-tokens 24 or",
        ),
        (
            ("--config", CONFIG, "--tp", "10", "--tensor-parallel-size", 5),
            1,
            "model.layers.0.mlp.gate_proj.weight: dim 0 = 18432 is not divisible by tp 5; use a tp of 1, 2, 3, 4",
        ),
        (("--measure", "--max-tokens", 8), 2, "--measure prints this machine's profile and takes no PATH"),
        (("--measure", "--set", "a=b"), 2, "--measure prints this machine's profile and takes no PATH"),
        (("--measure", "--svg", "e.svg"), 2, "--measure prints this machine's profile and takes no PATH"),
        (("--config", CONFIG, "--tp", "8", "--device", "abacus"), 1, "device abacus: no such profile; there are "),
        (
            ("--config", CONFIG, "--tp", "8", "--scheme", "int3"),
            2,
            "--scheme: unknown scheme int3; supported are bf16, ",
        ),
        (("--config", "nowhere.json", "--tp", "8"), 1, "nowhere.json: cannot be read: No such file or directory"),
        (
            ("--config", CONFIG, "--tp", "8", "--weights", "bf16"),
            2,
            "--weights goes with PATH; of a config.json, --scheme names the schemes to compare",
        ),
        (("nowhere", "--tp", "8"), 1, "nowhere: no such folder"),
    ],
)
def test_wrong_usage_and_bad_input_are_one_line(arguments: tuple[object, ...], code: int, message: str) -> None:
    wanted = ("--tp", "8") if arguments == () else ()
    done = reshard("estimate", *arguments, *wanted)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1


def test_a_model_without_dense_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 2, "num_local_experts": 4}'
    )
    done = reshard("estimate", "--config", tmp_path / "config.json", "--tp", "2")
    assert done.code == 1
    assert "no dense layer: config.json (mixtral: every layer is a MoE layer) gives none" in done.err


def test_a_model_that_is_not_known(tmp_path: Path) -> None:
    """Its numbers come with a warning, and there are none where nothing says which layers are dense."""
    config = {"model_type": "new", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"hidden_act": "silu"}))
    done = reshard("estimate", "--config", file, "--tp", "2")
    assert done.code == 0
    assert done.err.count("warning") == 1
    assert "model_type 'new' is not known here: which layers are dense (no experts, num_hidden_layers = 2)" in done.err
    file.write_text(json.dumps(config | {"num_experts": 4, "dense_every": 2}))
    done = reshard("estimate", "--config", file, "--tp", "2")
    assert (done.code, done.out) == (1, "")
    assert "num_experts = 4, and dense_every is not known: which layers are dense is not known without the" in done.err


def test_estimating_imports_no_torch() -> None:
    done = reshard_process(
        "estimate", "--config", CONFIG, "--tp", "1,8", before="import sys; sys.modules['torch'] = None"
    )
    assert done.code == 0, done.err


def test_measuring_without_torch_says_how_to_get_it() -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)"
    done = reshard_process("estimate", "--measure", before=hide)
    assert done.code == 1
    assert "--measure needs torch, which cannot be imported (not installed): pip install torch" in done.err


@pytest.mark.slow
def test_this_machine_is_measured_and_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes, whatever lies in the current folder; what comes out is a profile, and more than nothing."""
    monkeypatch.setattr("reshard.estimate.measure.MODULE", "tests.support.measure_little")
    (tmp_path / "reshard_runtime").mkdir()
    (tmp_path / "reshard_runtime" / "__init__.py").write_text("raise RuntimeError('another runtime')")
    monkeypatch.chdir(tmp_path)
    done = reshard("estimate", "--measure")
    assert done.code == 0, done.err
    (tmp_path / "local.toml").write_text(done.out)
    profile = load_profile(str(tmp_path / "local.toml"))
    assert profile.name.startswith("local: one of 2 processes")
    assert not profile.compute.overlap
    assert 1e-4 < profile.compute.bf16_tflops < 100
    assert 0.01 < profile.memory.bandwidth_gib_s < 10_000
    assert 0.1 < profile.network["host"].latency_us < 1e6
    assert all("measured by reshard estimate --measure" in line for line in profile.source.values())
    done = reshard(
        "estimate", "--config", CONFIG, "--tp", "1,2", "--device", tmp_path / "local.toml", "--format", "json"
    )
    assert [size["tp_size"] for size in done.document["schemes"][0]["sizes"]] == [1, 2]


def test_the_process_that_fails_first_is_the_error_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.estimate.measure.MODULE", "tests.support.measure_little")
    monkeypatch.setenv("MEASURE_FAILS", "1")
    done = reshard("estimate", "--measure")
    said = f"error: --measure: process 1 of 2 ({socket.gethostname()}): OSError: no such device; see to it"
    assert (done.code, done.out, done.err) == (1, "", f"{said} and start again\n")
