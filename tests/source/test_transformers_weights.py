"""config.json's transformers_weights: what transformers takes, whatever else the folder has."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.builders import Spec, build
from tests.support.corrupt import INDEX
from tests.support.refusals import refusal, warnings_of

SINGLE = "model.safetensors"


def told(model: Path, value: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": value}))


def test_transformers_weights_that_is_the_account(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    for same in (INDEX, f"./{INDEX}", None):
        told(tmp_path / "model", same)
        assert warnings_of(tmp_path / "model") == ()


@pytest.mark.parametrize(
    ("value", "indexed", "says"),
    [
        ("old.safetensors", True, f"which this folder does not have: another account of the weights than {INDEX}"),
        ("old.safetensors", False, "another account of the weights than the other files"),
        (5, True, "transformers_weights names 5, which"),
    ],
)
def test_transformers_weights_that_is_not_there(value: object, indexed: bool, says: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec(index=indexed))
    told(tmp_path / "model", value)
    said = refusal(tmp_path / "model")
    assert says in said
    assert f"say which is meant with --index {INDEX}" in said if indexed else "take it out of config.json" in said
    assert "--index old" not in said


def test_two_accounts_and_what_transformers_is_told(tmp_path: Path) -> None:
    """Beside an index that does not name it, transformers would take the single file: it is told another."""
    model = tmp_path / "model"
    build(model, Spec())
    shutil.copy(next(model.glob("*.safetensors")), model / SINGLE)
    told(model, INDEX)
    assert f"two accounts of the weights (transformers and vLLM both take what {INDEX} names)" in refusal(model)
