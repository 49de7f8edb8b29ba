"""Names that are other people's, through every command and form that can show them: nothing but printable text."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reshard.cli.output import Output, Table
from reshard.plan.pipeline import Cut
from tests.support.builders import Spec, build, read_safetensors, write_safetensors
from tests.support.manifests import edit_manifest
from tests.support.running import Done, reshard, split

INDEX = "quant_model_weights.safetensors.index.json"
HOSTILE = "x\x1b]0;pwn\x07\r\n::error::x\n##[error]x\u202e\x7f\x9b[bold]y"
LINE_START = "::error::x ##[warning]y"
FORMS = ("human", "json", "junit", "github")
_OURS = re.compile(r"::(error|warning|notice) (file=[^:]*,)?title=[^:]*::.*")


def check_safe(done: Done, form: str) -> None:
    """Both streams have printable lines, and no command of a CI system that is not ours."""
    for stream in (done.out, done.err):
        for line in stream.split("\n"):
            assert line.isprintable(), ascii(line)
            assert "##" not in line
            if line.lstrip().startswith("::"):
                assert form == "github"
                assert _OURS.fullmatch(line), line
    if form == "json" and done.out:
        json.loads(done.out)


def runs(folder: Path, shards: Path, out: Path) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Commands that show what is in a checkpoint and a set, each with a form that it has."""
    for form in FORMS:
        yield form, ("check", folder, "--tp", 2, "--format", form)
        yield form, ("check", shards, "--against", folder, "--format", form)
    for form in FORMS[:2]:
        yield form, ("inspect", folder, "--format", form)
        yield form, ("inspect", shards, "--format", form, "--debug")
        yield form, ("split", folder, out, "--tp", 2, "--dry-run", "--format", form)
        yield form, ("verify", shards, "--source", folder, "--format", form)
        yield form, ("estimate", folder, "--tp", 2, "--format", form)
        yield form, ("merge", shards, out / form, "--format", form)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a set of it."""
    place: Path = tmp_path_factory.mktemp("hostile")
    build(place / "model", Spec("modelslim_dynamic", hidden=64, intermediate=128, dense=1))
    split(place / "model", place / "set", Cut(2))
    return place


@pytest.mark.parametrize("name", [HOSTILE, LINE_START, "mod\udcffel", "n" * 255], ids=["all", "start", "utf8", "long"])
def test_folders(plain: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(plain / "model", tmp_path / "in" / name)
    shutil.copytree(plain / "set", tmp_path / "sets" / name)
    for form, arguments in runs(tmp_path / "in" / name, tmp_path / "sets" / name, tmp_path / "outs" / name):
        check_safe(reshard(*arguments), form)
    os.chdir(tmp_path / "in")  # the name alone begins the line
    for form in FORMS[:2]:
        config, out = plain / "model" / "config.json", Path(f"{name[:200]}{form}")
        for arguments in (
            ("split", name, out / "split", "--tp", 2),
            ("synth", config, out / "synth"),
            ("merge", plain / "set", out / "merge"),
            ("estimate", "--config", config, "--tp", 2, "--device", name, "--svg", f"{name}.svg"),
        ):
            check_safe(reshard(*arguments, "--format", form), form)
        assert (out / "split" / "manifest.json").exists()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of texts in a JSON value; keys of objects, too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))
    if isinstance(value, str | int | None):
        yield path


def kind(path: tuple[Any, ...]) -> str:
    """Where a value stands, whatever layer, rank or tensor it is of."""
    return ".".join("*" if isinstance(key, int) or "model.layers" in str(key) else str(key) for key in path)


def each_kind(value: Any) -> dict[str, tuple[Any, ...]]:
    return {kind(path): path for path in leaves(value) if path}


def put(value: Any, path: tuple[Any, ...], text: str) -> None:
    *holders, last = path
    for key in holders:
        value = value[key]
    value[last] = text


@pytest.mark.parametrize("file", ["config.json", "quant_model_description.json", INDEX])
def test_every_value_beside_the_weights(plain: Path, tmp_path: Path, file: str) -> None:
    raw = json.loads((plain / "model" / file).read_text())
    shutil.copytree(plain / "model", tmp_path / "model")
    for path in each_kind(raw).values():
        changed = json.loads(json.dumps(raw))
        put(changed, path, HOSTILE)
        (tmp_path / "model" / file).write_text(json.dumps({**changed, HOSTILE: HOSTILE}))
        for form, arguments in runs(tmp_path / "model", plain / "set", tmp_path / "out"):
            if arguments[1] == tmp_path / "model":
                check_safe(reshard(*arguments), form)


def test_every_value_of_a_manifest(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "set", tmp_path / "set")
    raw = (plain / "set" / "manifest.json").read_bytes()
    kinds = each_kind(json.loads(raw))
    assert {"source.name", "model.model_type", "scheme", "shards.*.tensors.*.name", "files.*.name"} <= kinds.keys()
    for number, path in enumerate(kinds.values()):
        (tmp_path / "set" / "manifest.json").write_bytes(raw)
        edit_manifest(tmp_path / "set", lambda manifest, path=path: put(manifest, path, HOSTILE))  # type: ignore[misc]
        every = runs(plain / "model", tmp_path / "set", tmp_path / str(number))
        some = [(form, arguments) for form, arguments in every if arguments[1] != plain / "model"]
        for form, arguments in some[number % 3 :: 3]:
            check_safe(reshard(*arguments), form)


@pytest.mark.parametrize("where", ["file", "tensor", "metadata"])
def test_weights(plain: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(plain / "model", tmp_path / "model")
    (tmp_path / "model" / INDEX).unlink()
    for path in list((tmp_path / "model").glob("*.safetensors")):
        tensors = read_safetensors(path)
        if where == "tensor":
            name = next(name for name in tensors if ".mlp." in name)
            tensors = {f"{HOSTILE}.{name}": tensors[name], f"model.layers.0.mlp.{HOSTILE}": tensors[name], **tensors}
        write_safetensors(path, tensors, {HOSTILE: HOSTILE} if where == "metadata" else None)
        if where == "file":
            path.rename(path.with_name(f"{HOSTILE}.safetensors"))
    for form, arguments in runs(tmp_path / "model", plain / "set", tmp_path / "out"):
        check_safe(reshard(*arguments), form)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", HOSTILE),
        ("inspect", "model", "--scheme", HOSTILE),
        ("inspect", "model", "--index", HOSTILE),
        ("inspect", "model", "--revision", HOSTILE),
        ("inspect", f"hf://{HOSTILE}"),
        ("split", "model", "out", "--tp", 2, "--ranks", HOSTILE),
        ("split", "model", f"x://{HOSTILE}", "--tp", 2),
        ("check", "model", "--tp", HOSTILE),
        ("check", "--config", HOSTILE),
        ("check", "model", "--additional-config", HOSTILE),
        ("check", "set", "--against", HOSTILE),
        ("verify", "set", "--source", HOSTILE),
        ("estimate", "model", "--tp", 2, "--set", HOSTILE),
        ("estimate", "model", "--tp", 2, "--weights", HOSTILE),
        ("synth", "model/config.json", "out", "--scale", HOSTILE),
        ("synth", "model/config.json", "out", "--scheme", HOSTILE),
    ],
    ids=lambda arguments: "-".join(str(word) for word in arguments if word != HOSTILE)[:40],
)
def test_arguments(plain: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]) -> None:
    monkeypatch.chdir(plain)
    for option in ((), ("--debug",)):
        done = reshard(*arguments, *option)
        assert done.code in (1, 2)
        check_safe(done, "human")


def test_markup_in_a_cell_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["[bold]x[/bold]", "[link=http://x]y[/link]", ":smile:", "[/]"]
    Output("human", quiet=True, debug=False).document({}, lambda: [Table(("a", "b", "c", "d"), [cells])])
    assert capsys.readouterr().out.splitlines()[-1].split() == cells


def test_a_name_of_megabytes_is_not_shown_whole(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain / "set", tmp_path / "set")
    name = "n" * 1_000_000
    edit_manifest(tmp_path / "set", lambda manifest: manifest["source"].update(name=name))
    done = reshard("inspect", tmp_path / "set")
    assert done.code == 0
    assert len(done.out) < 20_000
    assert "characters)" in done.out
    assert reshard("inspect", tmp_path / "set", "--format", "json").document["source"]["name"] == name
