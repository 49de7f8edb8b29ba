"""That the fuzz finds what it looks for: wrong bytes, output that no command may give, what does not end."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import answers, runs, truth, worker
from tests.fuzz.cases import Case, make_case
from tests.fuzz.run import run
from tests.fuzz.runs import Run
from tests.fuzz.subjects import SUBJECTS, TP, Made, copy, make
from tests.fuzz.worker import judged, wrong_output
from tests.support import mutate
from tests.support.builders import read_safetensors, write_safetensors
from tests.support.hub_server import REPO, Asked, Fault, Handler
from tests.support.mutate_tree import Members, Token, encode, parse
from tests.support.running import reshard
from tests.support.seal import reseal

GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("subject"), SUBJECTS[0])


def edited(made: Made, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The set with another manifest."""
    out = folder / "set"
    reshard("split", made.source, out, "--tp", TP, "--quiet")
    manifest = json.loads((out / "manifest.json").read_bytes())
    change(manifest)
    (out / "manifest.json").write_bytes(reseal(json.dumps(manifest).encode()))
    return out


def test_a_cut_with_one_other_byte_is_wrong(made: Made, tmp_path: Path) -> None:
    out = edited(made, tmp_path, lambda manifest: None)
    truth.check_cut(out, made.dense, TP, made.share, "fused")
    path = out / "denseffn-rank-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(AssertionError, match=r"rank-00001.*down_proj\.weight"):
        truth.check_cut(out, made.dense, TP, made.share, "fused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][0]["tensors"][0]["slices"][0].update(start=1, stop=65), "give other bytes"),
        (lambda m: m["shards"][0]["tensors"][0].update(blake3="0" * 64), "digest"),
        (lambda m: m["shards"][0].update(size=1), "digest"),
        (lambda m: m["shards"][0]["tensors"].append(m["shards"][0]["tensors"][0]), "other tensors"),
    ],
)
def test_a_manifest_that_is_not_true_is_wrong(
    change: Callable[[dict[str, Any]], object], message: str, made: Made, tmp_path: Path
) -> None:
    out = edited(made, tmp_path, change)
    with pytest.raises(AssertionError, match=message):
        truth.check_cut(out, made.dense, TP, made.share, "fused")


def test_another_promise_is_wrong(made: Made, tmp_path: Path) -> None:
    out = edited(made, tmp_path, lambda m: m["layers"][0]["activation"].update(function="gelu"))
    truth.check_cut(out, made.dense, TP, made.share, "fused")
    with pytest.raises(AssertionError, match="layers is not what was written"):
        truth.check_meaning(out, made.whole)


def test_a_merged_checkpoint_with_other_bytes_is_wrong(made: Made, tmp_path: Path) -> None:
    out, side_files = tmp_path / "merged", {"config.json": (made.whole / "config.json").read_bytes()}
    assert reshard("merge", made.whole, out).code == 0
    truth.check_merged(out, made.dense, side_files)
    path = out / "model-00001-of-00001.safetensors"
    tensors = read_safetensors(path)
    one, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    write_safetensors(path, tensors | {one: tensors[other], other: tensors[one]})
    with pytest.raises(AssertionError, match=f"{one}: other bytes"):
        truth.check_merged(out, made.dense, side_files)


@pytest.mark.parametrize(
    ("out", "err", "code", "fault"),
    [
        ("fine\n", "warning: it is\nerror: one\n", 1, []),
        ("fine\n", "", 0, []),
        ("", "error: one\nerror: two\n", 1, ["2 error lines"]),
        ("", "", 1, ["0 error lines"]),
        ("\x1b[31m\n", "", 0, ["stdout has '\\x1b'"]),
        ("", "error: \u202e\n", 1, ["stderr has '\\u202e'"]),
        ("::error::forged\n", "", 0, ["stdout has a line that a workflow takes for a command"]),
        ("x" * 300_000, "", 0, ["stdout has 300,000 characters"]),
        ("", "Something else\n", 0, ["stderr has the line 'Something else'"]),
        ("", "error: Traceback (most recent call last)\n", 1, ["it says 'Traceback'"]),
        ("http://user:secret@host", "", 0, ["a password is repeated"]),
    ],
)
def test_output_that_no_command_may_give(out: str, err: str, code: int, fault: list[str]) -> None:
    assert wrong_output(out, err, code) == fault


def test_what_a_command_must_not_do(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_BYTES", 30_000_000)

    def leak() -> None:
        bytearray(b"x" * 40_000_000)

    def wrong() -> bool:
        raise AssertionError("other bytes")

    runs = [
        Run(("raises",), call=lambda: [].pop()),
        Run(("takes",), call=leak),
        Run(("inspect", "nowhere"), wrong),
        Run(("inspect", str(made.source)), wrong),
        Run(("inspect", str(made.source)), lambda: True),
    ]
    began: list[str] = []
    verdicts = list(judged(Case("", runs), lambda run: began.append(run.line)))
    assert began == [run.line for run in runs]
    assert "an exception: IndexError: pop from empty list" in verdicts[0].faults[0]
    assert verdicts[1].faults == [f"{verdicts[1].peak / 1e6:.0f} MB more than at the start"]
    assert (verdicts[2].code, verdicts[2].faults, verdicts[2].proven) == (1, [], False)
    assert verdicts[3].faults == ["ended with 0 and is not right: AssertionError: other bytes (wrong)"]
    assert (verdicts[4].code, verdicts[4].faults, verdicts[4].proven) == (0, [], True)


@pytest.mark.parametrize("name", ["static", "fp8", "fp8-padded", "o_proj", "lm_head"])
def test_what_is_whole_is_accepted_and_proved(name: str, tmp_path: Path) -> None:
    subject = make(tmp_path / "made", next(subject for subject in SUBJECTS if subject.name == name))
    rng, as_it_is = random.Random(0), answers.serving_files(subject.source, lambda handler, asked: False)
    copies = {place: copy(getattr(subject, place), tmp_path / place) for place in ("whole", "source", "unfinished")}
    cases = [
        Case("", runs.of_set(rng, subject, copies["whole"], tmp_path / "1")),
        Case("", runs.of_source(rng, subject, copies["source"], tmp_path / "2")),
        Case("", runs.of_address(REPO, rng, subject, tmp_path / "3"), as_it_is),
        Case(
            "",
            runs.of_set(rng, subject, subject.whole, tmp_path / "5", address=runs.HERE),
            answers.serving_files(subject.whole, answers.as_web),
        ),
        Case("", runs.of_unfinished(rng, subject, copies["unfinished"], tmp_path / "4")),
    ]
    verdicts = [verdict for case in cases for verdict in judged(case, lambda run: None)]
    refused = [verdict.line for verdict in verdicts if verdict.code]
    assert [line for line in refused if str(copies["unfinished"]) not in line or line.startswith("split")] == []
    assert [(verdict.line, verdict.faults) for verdict in verdicts if verdict.faults] == []
    proven = {verdict.line.split()[0].partition("(")[0] for verdict in verdicts if verdict.proven}
    load = "load_shard" if subject.subject.key == "denseffn" else "load_tensors"
    assert proven == {"split", "verify", "merge", load}


def gone(handler: Handler, asked: Asked) -> bool:
    handler.answer(404)
    return True


@pytest.mark.parametrize("address", [REPO, runs.HERE])
def test_a_server_s_other_answers_are_given(address: str, made: Made, tmp_path: Path) -> None:
    """Spoilt answers reach the client; without them the same commands go through."""
    spoils: dict[str, Fault] = {"as it is": answers.as_web}
    spoils["gone"] = gone
    codes = {}
    for said, spoil in spoils.items():
        around = answers.serving_files(made.source, spoil)
        case = Case("", runs.of_address(address, random.Random(0), made, tmp_path / said), around)
        codes[said] = [(verdict.code, verdict.faults) for verdict in judged(case, lambda run: None)]
    assert codes["as it is"] == [(0, [])] * 5
    assert codes["gone"] == [(1, [])] * 5


def hanging(seed: int, number: int, made: Callable[[str], Made], folder: Path) -> Case:
    """Cases of which the second does not end and the third ends its process."""
    calls: list[Callable[[], object]] = [lambda: None, lambda: time.sleep(60), lambda: folder.joinpath("x").exists()]
    if number == 2:
        import os

        calls[2] = lambda: os._exit(9)
    return Case(f"case {number}", [Run(("call",), call=calls[number])])


def test_a_command_that_does_not_end_is_killed_and_the_rest_is_run(tmp_path: Path) -> None:
    summary = run(7, [1, 2, 0], tmp_path, 1, make=hanging, max_seconds=0.5)
    assert [(fault.number, fault.what) for fault in summary.faults] == [
        (1, "it has not ended after 0.5 s"),
        (2, "the process died (9)"),
    ]
    assert str(summary.faults[0]).endswith("replay: make fuzz SEED=7 ONLY=1")
    assert (summary.cases, dict(summary.commands)) == (1, {"shown": 1})


def test_a_number_gives_the_same_case(made: Made, tmp_path: Path) -> None:
    said: list[list[str]] = []
    for again in ("first", "second"):
        said.append([])
        for number in range(8):
            folder = tmp_path / again / str(number)
            folder.mkdir(parents=True)
            said[-1].append(make_case(5, number, lambda name: made, folder).said)
    assert said[0] == said[1]
    assert len(set(said[0])) == 8


def test_a_tree_keeps_what_json_allows() -> None:
    raw = b'{"a": [1, {"a": null}], "a": 1.5, "b": "\\ud800"}'
    assert encode(parse(raw)) == raw
    assert encode(Members([["a", Token("1e999")], ["a", True]])) == b'{"a": 1e999, "a": true}'


def test_every_mutation_changes_the_text() -> None:
    raw = json.dumps({"layers": [{"index": i, "name": f"layers.{i}.gate_proj"} for i in range(3)], "n": 12}).encode()
    for number in range(300):
        tree = parse(raw)
        said = mutate.mutate(random.Random(number), tree)
        assert encode(tree) != raw or "another order" in said, said
