"""What an address means."""

from pathlib import Path

import pytest

from reshard.errors import UsageError
from reshard.model.parts import LM_HEAD
from reshard.source.address import Address, parse_address, parse_local_target, parse_target
from reshard.source.open import part_address


@pytest.mark.parametrize(
    ("text", "kind", "place"),
    [
        ("deepseek-ai/DeepSeek-R1", "hf", "deepseek-ai/DeepSeek-R1"),
        ("hf://deepseek-ai/DeepSeek-R1", "hf", "deepseek-ai/DeepSeek-R1"),
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
    assert parse_address(text) == Address(kind, place)


@pytest.mark.parametrize(
    ("several", "one"),
    [
        ("r1-parts", "r1-parts/lm_head"),
        ("/", "/lm_head"),
        ("s3://bucket/r1-parts/", "s3://bucket/r1-parts/lm_head"),
        ("memory://", "memory://lm_head"),
        ("https://host", "https://host/lm_head"),
        ("HTTP://host/r1/?Signature=a/b", "http://host/r1/lm_head?Signature=a/b"),
        ("zip::s3://bucket/r1.zip", "zip://lm_head::s3://bucket/r1.zip"),
        ("zip://::s3://bucket/r1.zip", "zip://lm_head::s3://bucket/r1.zip"),
        ("zip://r1/::s3://bucket/r1.zip", "zip://r1/lm_head::s3://bucket/r1.zip"),
    ],
)
def test_where_a_part_s_set_is(several: str, one: str) -> None:
    assert part_address(several, LM_HEAD) == one


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("org/model").kind == "hf"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert parse_address("org/model").kind == "folder"


def test_revisions() -> None:
    assert parse_address("org/model", "v1") == Address("hf", "org/model", "v1")
    assert parse_address("hf://org/model@refs/pr/1") == Address("hf", "org/model", "refs/pr/1")
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no place: give a folder"),
        ("file://", "file://: names no place"),
        ("s3://", "s3://: names no place"),
        ("memory:///", "memory:///: names no place"),
        ("s3:/bucket/sets", "an address is written s3://…, and a folder of that name ./s3:/bucket/sets"),
        ("hf://org/name", "a hub is read, not written"),
    ],
)
def test_what_is_no_place_to_write_to(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert message in str(caught.value)


def test_where_to_write() -> None:
    assert parse_target("org/name") == Address("folder", "org/name")
    assert parse_target("./s3:/bucket") == Address("folder", "./s3:/bucket")
    assert parse_target("arrow_hdfs://host/sets") == Address("remote", "arrow_hdfs://host/sets")
    assert parse_local_target("file:///sets", "merge") == Path("/sets")
    with pytest.raises(UsageError, match=r"s3://bucket/m: merge writes to this host only; give a path here"):
        parse_local_target("s3://bucket/m", "merge")
