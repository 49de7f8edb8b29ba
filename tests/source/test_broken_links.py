"""Links to no file: never taken for a file that nobody put there."""

from pathlib import Path

import pytest

from reshard.errors import ManifestError, ReshardError, ShardError
from reshard.model.naming import shard_file
from reshard.plan.pipeline import Cut
from reshard_runtime.loader import load_shard
from tests.support.builders import Spec, build
from tests.support.corrupt import DESCRIPTION, INDEX
from tests.support.refusals import broken_link, refusal, warnings_of
from tests.support.running import reshard, split

SINGLE = "model.safetensors"


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", DESCRIPTION, INDEX])
def test_a_broken_link_is_no_absent_file(file: str, tmp_path: Path) -> None:
    """Without config.json names alone decide, without a description or an index the files do: nobody has said so."""
    build(tmp_path / "model", Spec())
    broken_link(tmp_path / "model" / file)
    link = f"{file} is a link to ../blobs/gone ({tmp_path}/blobs/gone), which is not there (is that disk mounted?)"
    assert link in refusal(tmp_path / "model", "split")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("../../blobs/h1", "is a link to ../../blobs/h1 ("),
        ("/disk/of/blobs/h1", "is a link to /disk/of/blobs/h1, which is not there"),
        (SINGLE, f"is a link to {SINGLE}, which leads back to itself"),
    ],
)
def test_the_weights_are_a_broken_link(target: str, says: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(files=1, index=False))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.unlink()
    broken_link(path.with_name(SINGLE), target)
    said = refusal(tmp_path / "model")
    assert f"{SINGLE} {says}" in said
    assert "no safetensors file" not in said


def test_a_description_that_is_not_read_may_be_a_broken_link(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    broken_link(tmp_path / "model" / "quant_model_description_w8a8_dynamic.json")
    (line,) = warnings_of(tmp_path / "model")
    assert line.startswith("quant_model_description_w8a8_dynamic.json is not read, and differs from")


@pytest.mark.parametrize("file", ["manifest.json", "config.json", shard_file(1, 2)])
def test_a_broken_link_in_a_shard_set(file: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    broken_link(tmp_path / "set" / file)
    for command in (
        ("verify", tmp_path / "set"),
        ("merge", tmp_path / "set", tmp_path / "merged"),
        ("check", tmp_path / "set"),
        ("inspect", tmp_path / "set"),
    ):
        done = reshard(*command)
        assert done.code in (1, 3)
        assert "a link to ../blobs/gone (" in done.out + done.err
        assert "copy the whole set" not in done.out + done.err
        assert "--resume" not in done.out + done.err


@pytest.mark.parametrize(("file", "error"), [("manifest.json", ManifestError), (shard_file(1, 2), ShardError)])
def test_the_loader_names_a_broken_link(file: str, error: type[ReshardError], tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "set", Cut(2))
    broken_link(tmp_path / "set" / file)
    with pytest.raises(error, match=rf"{file}:? is a link to ../blobs/gone \(.*which is not there") as caught:
        load_shard(tmp_path / "set", 1)
    assert "copy" not in str(caught.value)
