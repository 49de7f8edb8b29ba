"""A secret that a command is given or finds in its environment is in nothing that it says, and in nothing it writes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from reshard.source.retry import RetryPolicy
from tests.support.builders import Spec, build
from tests.support.running import reshard, reshard_process, split

SECRET = "S3CR3TofTheTest"
NOWHERE = "127.0.0.1:9"  # nothing listens there
ADDRESSES = {
    "http": f"http://user:{SECRET}@{NOWHERE}/model",
    "http with a slash": f"http://user:a/{SECRET}@{NOWHERE}/model",
    "http token": f"http://{SECRET}@{NOWHERE}/model",
    "query": f"http://{NOWHERE}/model?token={SECRET}&x=1",
    "s3": f"s3://AKIA:{SECRET}@bucket/model",
    "s3 with a slash": f"s3://AKIA:ab/{SECRET}@bucket/model",
    "s3 that ends in a slash": f"s3://AKIA:{SECRET}/ab@bucket/model",
    "github": f"github://org:repo:{SECRET}@main/model",
    "ftp": f"ftp://user:{SECRET}@{NOWHERE}/model",
    "zip": f"zip://model::http://user:{SECRET}@{NOWHERE}/model.zip",
    "no such protocol": f"nonsense://user:{SECRET}@host/model",
    "no protocol": f"user:{SECRET}@host/model",
    "hub": f"hf://user:{SECRET}@org/model",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a set of it."""
    place: Path = tmp_path_factory.mktemp("secrets")
    build(place / "model", Spec(hidden=64, intermediate=128, dense=1))
    split(place / "model", place / "set", Cut(2))
    return place


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second try, and no host that answers for S3."""
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (1, 0.0, 0.0, 0.0, None))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOWHERE}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def commands(address: str, plain: Path) -> Iterator[tuple[object, ...]]:
    for form in ("human", "json", "junit", "github"):
        yield "check", address, "--format", form
        yield "check", plain / "set", "--against", address, "--format", form
    for form in ("human", "json"):
        yield "inspect", address, "--format", form
        yield "split", address, plain / "out", "--tp", 2, "--format", form
        yield "split", plain / "model", address, "--tp", 2, "--format", form
        yield "verify", plain / "set", "--source", address, "--format", form
        yield "merge", address, plain / "out", "--format", form
        yield "merge", plain / "set", address, "--format", form
        yield "estimate", address, "--tp", 2, "--format", form
        yield "synth", plain / "model" / "config.json", address, "--format", form
    yield "inspect", address, "--debug"
    yield "estimate", plain / "model", "--tp", 2, "--svg", address


@pytest.mark.parametrize("kind", ADDRESSES)
def test_of_an_address(kind: str, plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    every = list(commands(ADDRESSES[kind], plain))
    for arguments in every[::4] if kind.startswith("s3") else every:  # each asks S3's client, which takes its time
        done = reshard(*arguments)
        assert SECRET not in done.out + done.err, arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", f"http://user:{SECRET}@{NOWHERE}"),
        ("HF_ENDPOINT", f"http://{NOWHERE}/?token={SECRET}"),
        ("HF_ENDPOINT", f"user:{SECRET}@host"),
        ("HF_TOKEN", f"{SECRET}\n"),
        ("HF_TOKEN", f"{SECRET}\u00e9"),
        ("AWS_SECRET_ACCESS_KEY", f"{SECRET}\nx"),
        ("AWS_ENDPOINT_URL", f"http://user:{SECRET}@{NOWHERE}"),
        ("HTTP_PROXY", f"http://user:{SECRET}@{NOWHERE}"),
    ],
)
def test_of_the_environment(name: str, value: str, plain: Path) -> None:
    source = "s3://bucket/model" if name.startswith("AWS") else "org/model"
    environment = {"HF_ENDPOINT": f"http://{NOWHERE}", "AWS_ENDPOINT_URL": f"http://{NOWHERE}", name: value}
    once = "import reshard.source.retry as retry; retry.RetryPolicy.__init__.__defaults__ = (1, 0.1, 0.1, 0.1, None)"
    done = reshard_process("inspect", source, "--debug", before=once, **environment)
    assert done.code == 1
    assert SECRET not in done.out + done.err
    assert "Traceback" in done.err


def test_of_a_folder_s_name(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a set says of its source is read by others."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    shutil.copytree(plain / "model", tmp_path / f"model-{SECRET}")
    assert reshard("split", tmp_path / f"model-{SECRET}", tmp_path / "out", "--tp", 2).code == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b'"name": "model-***"' in written
    assert SECRET.encode() not in written
