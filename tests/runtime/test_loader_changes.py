"""Sets and files that change while they are loaded, and after: what is loaded is of one set, and stays as it is."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from reshard.errors import ManifestError, ReshardError, ShardError
from reshard.manifest import parse_manifest
from reshard.model.naming import MANIFEST, shard_file
from reshard.plan.pipeline import Cut, prepare
from reshard.regular import Opened
from reshard.source.open import open_source
from reshard.writer import folder as writer
from reshard.writer.file import DirectFile
from reshard.writer.split import SplitOptions, write_shards
from reshard_runtime import Shard, load_shard, loader
from tests.support.builders import Spec, build
from tests.support.running import split

State = tuple[Path | None, Path | None]
"""What the names of the manifest and of rank 1's shard lead to."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two models, and `set`."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def states(folder: Path) -> list[State]:
    """The set in every state that a reader can meet while another replaces it, and then the first one again."""
    out, kept = folder / "set", folder / "kept"
    kept.mkdir()
    for name, seed in (("model", 0), ("another", 1)):
        build(folder / name, Spec("bf16", seed=seed))
    split(folder / "model", out, Cut(2))
    found: list[State] = []
    links: dict[tuple[int, int], Path] = {}

    def look() -> None:
        state: list[Path | None] = []
        for name in (MANIFEST, shard_file(1, 2)):
            try:
                status = (out / name).stat()
            except FileNotFoundError:
                state.append(None)
                continue
            # Kept by a link, so that no inode is used again.
            key = (status.st_dev, status.st_ino)
            if key not in links:
                links[key] = kept / str(len(links))
                os.link(out / name, links[key])
            state.append(links[key])
        if not found or found[-1] != tuple(state):
            found.append((state[0], state[1]))

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((DirectFile, "commit"), (writer.OutputFolder, "rename"), (writer.OutputFolder, "remove")):
            patched.setattr(owner, name, _followed_by(getattr(owner, name), look))
        look()
        for source in ("another", "model"):
            with open_source(str(folder / source)) as opened:
                write_shards(prepare(opened, Cut(2)), out, SplitOptions(overwrite=True, workers=1))
    return found


def _followed_by(change: Callable[..., object], look: Callable[[], None]) -> Callable[..., object]:
    def both(*args: object) -> object:
        result = change(*args)
        look()
        return result

    return both


def test_the_writer_has_no_manifest_beside_another_set_s_shard(states: list[State]) -> None:
    """What `one_set` relies on: the manifest goes first and comes last, and comes back as another file."""
    manifests, shards = zip(*states, strict=True)
    (first, middle, last) = dict.fromkeys(filter(None, manifests))
    (one, other, again) = dict.fromkeys(shards)
    assert states == [
        (first, one), (None, one), (None, other), (middle, other), (None, other), (None, again), (last, again)
    ]  # fmt: skip
    assert first.read_bytes() == last.read_bytes()
    assert one.read_bytes() == again.read_bytes()


def put(state: State, folder: Path) -> None:
    """Let the names lead there. The files beside them are the same in all sets."""
    for name, file in zip((MANIFEST, shard_file(1, 2)), state, strict=True):
        (folder / name).unlink(missing_ok=True)
        if file is not None:
            os.link(file, folder / name)


def test_a_shard_is_never_taken_under_another_set_s_manifest(
    states: list[State], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order in which a load can meet the writer: when it reads the manifest, the shard, and looks again."""
    read_manifest, difference = loader.read_manifest, Opened.difference
    coming: list[State] = []

    def read_then(folder: Path) -> object:
        read = read_manifest(folder)
        put(coming.pop(), folder)
        return read

    def look_then(opened: Opened) -> str | None:
        found = difference(opened)
        put(coming.pop(), opened.path.parent)
        return found

    monkeypatch.setattr(loader, "read_manifest", read_then)
    monkeypatch.setattr(Opened, "difference", look_then)
    loaded, said = [], set()
    for file in (folder / "set").glob("*.json"):
        shutil.copy(file, tmp_path)
    for steps in itertools.combinations_with_replacement(range(len(states)), 3):
        first, *others = (states[step] for step in steps)
        put(first, tmp_path)
        coming[:] = others[::-1]
        try:
            shard = load_shard(tmp_path, 1)
        except ReshardError as error:
            said.add((type(error), str(error).removeprefix(str(tmp_path))))
            continue
        assert first[0] is not None
        assert _weights(shard) == _promised(first[0]), steps
        loaded.append(steps)
    assert loaded == [(step, step, step) for step, (manifest, _) in enumerate(states) if manifest]
    assert said == {
        (ManifestError, f"/{MANIFEST}: was replaced while the set was read; load it again"),
        (ManifestError, f": no {MANIFEST} (the shard set is incomplete: finish it with reshard split --resume)"),
    }


def _weights(shard: Shard) -> list[str]:
    """BLAKE3 of what is held."""
    weights = (linear.tensors["weight"] for layer in shard.layers.values() for linear in layer.linears)
    return [blake3(weight.view(torch.uint8).numpy()).hexdigest() for weight in weights]


def _promised(manifest: Path) -> list[str]:
    """The same of rank 1's shard."""
    digests = {tensor.name: tensor.blake3 for tensor in parse_manifest(manifest.read_bytes()).shards[1].tensors}
    return [digests[f"model.layers.{i}.mlp.{name}.weight"] for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("verify", ["header", "digest"])
@pytest.mark.parametrize("recipe", ["bf16", "modelslim_static", "fp8_block"])
def test_what_is_loaded_is_no_map_of_the_file(tmp_path: Path, recipe: str, verify: loader.Verify) -> None:
    """A map would change with the file, and end the process where the file is cut."""
    build(tmp_path / "model", Spec(recipe, 256, 512))
    split(tmp_path / "model", tmp_path / "set", Cut(1))
    path = tmp_path / "set" / shard_file(0, 1)
    shard = load_shard(tmp_path / "set", 0, verify=verify, dequantize=False)
    assert str(path) not in Path("/proc/self/maps").read_text()
    before = _weights(shard)
    with path.open("r+b") as opened:  # as cp does it
        opened.write(bytes(path.stat().st_size))
    assert _weights(shard) == before
    with pytest.raises(ShardError):
        load_shard(tmp_path / "set", 0)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "model", Spec("bf16"))
    split(tmp_path / "model", tmp_path / "set", Cut(1))
    fill = Opened.fill

    def cut_first(opened: Opened, into: memoryview, start: int) -> int:
        os.truncate(opened.path, start + 10)
        return fill(opened, into, start)

    monkeypatch.setattr(Opened, "fill", cut_first)
    with pytest.raises(
        ShardError, match=r"gate_up_proj.weight: the file was cut short while it was read; copy the shard"
    ):
        load_shard(tmp_path / "set", 0)
