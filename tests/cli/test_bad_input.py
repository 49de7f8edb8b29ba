"""Every bad input ends in one clear line: what is wrong, both sides of it, the way out. Nothing is written."""

import os
import shutil
from pathlib import Path

import pytest

from reshard.errors import SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import open_source
from tests.support import cases_sets
from tests.support.advice import foreign_options
from tests.support.builders import Spec, build, read_safetensors
from tests.support.cases import CASES, bad_source, listing, split_thoroughly
from tests.support.corrupt import FIRST, Case
from tests.support.running import Done, reshard, reshard_process

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


def check_message(case: Case, message: str) -> None:
    """It is one line of text, names what the case calls for, and offers a way out."""
    assert message.isprintable(), message
    assert [part for part in case.says if part not in message] == [], message
    assert any(phrase in message for phrase in case.way_out.split("|")), f"no {case.way_out!r} in: {message}"


@each_case
def test_refused(case: Case, tmp_path: Path) -> None:
    source = bad_source(case, tmp_path)
    before = listing(tmp_path)
    done = reshard("split", source, tmp_path / "new" / "out", "--tp", case.tp_size, "--format", "json")
    message = said(done)
    assert done.document == {"error": {"kind": case.error.__name__, "message": message}}
    check_message(case, message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["header not JSON", "share off the block grid", "set with a changed shard"])
def test_program_refuses(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == name)
    source, out = bad_source(case, tmp_path), tmp_path / "new" / "out"
    done = reshard_process("split", source, out, "--tp", case.tp_size)
    assert done.out == ""
    check_message(case, said(done))
    assert not out.parent.exists()


def said(done: Done) -> str:
    """Exit code 1, and one line `error: …` on stderr."""
    assert done.code == 1, done.err
    (line,) = done.err.splitlines()
    assert foreign_options("split", line) == []
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("file", [FIRST, "config.json"])
def test_unreadable_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: a test run by root can read whatever its mode is."""
    build(tmp_path / "model", Spec())
    opened = os.open

    def refuse(path: str, *args: int, **kwargs: int) -> int:
        if str(path).endswith(f"/model/{file}"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SourceError, match=rf"{file}: cannot be read: Permission denied; ."):
        split_thoroughly(tmp_path / "model", tmp_path / "out", Cut(2))
    assert not (tmp_path / "out").exists()


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """models--org--name/snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    build(snapshot, Spec())
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    split_thoroughly(snapshot, tmp_path / "linked", Cut(2))

    build(tmp_path / "plain" / "0123abc", Spec())
    split_thoroughly(tmp_path / "plain" / "0123abc", tmp_path / "out", Cut(2))
    written = {path.name: path.read_bytes() for path in (tmp_path / "linked").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_file_that_the_index_leaves_out_is_ignored(tmp_path: Path) -> None:
    """As every engine does: the index says what belongs to the checkpoint."""
    build(tmp_path / "model", Spec())
    shutil.copy(tmp_path / "model" / FIRST, tmp_path / "model" / "consolidated.safetensors")
    checkpoint = split_thoroughly(tmp_path / "model", tmp_path / "out", Cut(2))
    assert "consolidated.safetensors" not in {file.name for file in checkpoint.identity.files}


# The ways out that the messages offer do work.


def test_separate_layout_keeps_both_input_scales(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_static"))
    cases_sets.unequal_scales(tmp_path / "model")
    split_thoroughly(tmp_path / "model", tmp_path / "out", Cut(2, layout="separate"))
    for shard in (tmp_path / "out").glob("*.safetensors"):
        held = read_safetensors(shard)
        assert held["model.layers.0.mlp.gate_proj.input_scale"] == ("BF16", (1,), b"\x00\x40")
        assert held["model.layers.0.mlp.up_proj.input_scale"] == ("BF16", (1,), b"\x40\x40")


@pytest.mark.parametrize("cut", [Cut(1), Cut(3), Cut(9), Cut(2, pad=True)], ids=str)
def test_other_sizes_and_padding_suit_the_block_grid(cut: Cut, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block", intermediate=1152))
    split_thoroughly(tmp_path / "model", tmp_path / "out", cut)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == cut.tp_size


def test_bf16_weights_need_no_block_grid(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    build(tmp_path / "model", Spec("fp8_block", intermediate=1152))
    split_thoroughly(tmp_path / "model", tmp_path / "out", Cut(2, weights="bf16"))
    held = read_safetensors(next(iter((tmp_path / "out").glob("*.safetensors"))))
    assert held["model.layers.0.mlp.down_proj.weight"][:2] == ("BF16", (256, 576))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16, 256, 512])
def test_sizes_that_divide(tp_size: int, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    with open_source(str(tmp_path / "model")) as source:
        assert len(prepare(source, Cut(tp_size)).plan.shards) == tp_size
