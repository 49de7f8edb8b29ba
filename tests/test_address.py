"""What an address means."""

from pathlib import Path

import pytest

from reshard.address import Address, parse_address
from reshard.errors import UsageError


@pytest.mark.parametrize(
    ("text", "kind", "place"),
    [
        ("deepseek-ai/DeepSeek-R1", "hub", "deepseek-ai/DeepSeek-R1"),
        ("hf://deepseek-ai/DeepSeek-R1", "hub", "deepseek-ai/DeepSeek-R1"),
        ("s3://bucket/models/r1", "remote", "s3://bucket/models/r1"),
        ("memory://model", "remote", "memory://model"),
        ("zip://::s3://bucket/r1.zip", "remote", "zip://::s3://bucket/r1.zip"),
        ("file:///models/r1", "folder", "/models/r1"),
        ("/models/r1", "folder", "/models/r1"),
        ("./org/model", "folder", "./org/model"),
        ("../model", "folder", "../model"),
        ("model", "folder", "model"),
        ("a/b/c", "folder", "a/b/c"),
        ("org/model/", "folder", "org/model/"),
        ("~/model", "folder", "~/model"),
    ],
)
def test_what_an_address_means(text: str, kind: str, place: str) -> None:
    assert parse_address(text) == Address(kind, place)  # type: ignore[arg-type]


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("org/model").kind == "hub"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert parse_address("org/model").kind == "folder"


def test_revisions() -> None:
    assert parse_address("org/model", "v1") == Address("hub", "org/model", "v1")
    assert parse_address("hf://org/model@refs/pr/1") == Address("hub", "org/model", "refs/pr/1")
    assert parse_address("hf://org/model@refs%2Fpr%2F1").revision == "refs/pr/1"
    assert parse_address("hf://org/model@v1", "v1").revision == "v1"
    for text in ("hf://org/model@v2", "/models/r1", "s3://bucket/r1"):
        with pytest.raises(UsageError, match="--revision v1"):
            parse_address(text, "v1")


@pytest.mark.parametrize("text", ["org/model", "hf://org/model@v1", "/models/r1"])
def test_an_empty_revision_is_refused(text: str) -> None:
    """As an unset variable gives it."""
    with pytest.raises(UsageError, match="--revision: is empty"):
        parse_address(text, "")


@pytest.mark.parametrize("text", ["hf://model", "hf://datasets/org/name", "hf://", "hf://org/name@"])
def test_what_is_no_model_repository(text: str) -> None:
    with pytest.raises(UsageError, match="hf://ORG/NAME"):
        parse_address(text)
