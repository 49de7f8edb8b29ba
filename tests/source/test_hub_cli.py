"""The command line with an address on the hub; in processes of their own where one is killed, interrupted or set up."""

import re
import shlex
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from reshard.plan.pipeline import Cut
from reshard.source import hub as hub_module
from reshard.source.hub import find_repository
from tests.support.builders import Spec, build
from tests.support.hub_server import COMMIT, ORIGIN, REPO, Asked, Handler, Hub, serving
from tests.support.paths import ROOT
from tests.support.running import interrupted, reshard, reshard_process, same_but_for_the_origin, split
from tests.support.transcripts import check_output, commands_of

SET_COMMIT = "3" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Commit 1, main, is a checkpoint, 3 its shard set. It is this process's hub."""
    build(tmp_path / "model", Spec("modelslim_dynamic", computable=True))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    commits = {COMMIT: tmp_path / "model", SET_COMMIT: tmp_path / "right"}
    with serving(Hub(commits, {"main": COMMIT, "tp2": SET_COMMIT})) as running:
        use(running, monkeypatch)
        yield running


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of HF_ENDPOINT, which huggingface_hub reads once, when it is imported."""
    monkeypatch.setattr(hub_module, "find_repository", partial(find_repository, endpoint=hub.url))


def elsewhere(hub: Hub, **more: str) -> dict[str, str]:
    """What a process of its own reads from its environment when it starts."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **more}


def same_files(made: Path, right: Path) -> None:
    for path in right.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_checkpoint_is_inspected_split_and_verified(hub: Hub, tmp_path: Path) -> None:
    seen = reshard("inspect", REPO, "--format", "json")
    assert seen.code == 0, seen.err
    assert seen.document["source"] == {"kind": "hub", "name": REPO, "commit": COMMIT}
    done = reshard("split", REPO, tmp_path / "out", "--tp", 2, "--revision", "main")
    assert done.code == 0, done.err
    assert re.search(r"^split: \S+ \S+ in \S+ s", done.err, re.MULTILINE)
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
    checked = reshard("verify", tmp_path / "out", "--source", REPO, "--revision", COMMIT, "--quiet")
    assert checked.code == 0, checked.out + checked.err
    assert f"every byte matches {REPO}" in checked.out


def test_a_revision_is_checked_and_estimated(hub: Hub) -> None:
    """main is a checkpoint, tp2 its shard set."""
    for revision, kind in (("main", "checkpoint"), ("tp2", "shard set")):
        done = reshard("check", REPO, "--revision", revision, "--format", "json")
        assert done.code == 0, done.err
        assert done.document["targets"][0]["kind"] == kind
    assert reshard("check", REPO, "--revision", "none").code == 1
    done = reshard("estimate", REPO, "--revision", "tp2", "--tp", 1, "--format", "json")
    assert done.code == 0, done.err
    assert done.document["source"] == "model"  # what the set was cut from
    for command in (("check",), ("estimate", "--tp", 1)):
        done = reshard(*command, "--config", ROOT / "configs" / "deepseek-r1.json", "--revision", "main")
        assert done.code == 2
        assert "--revision goes with a " in done.err


def test_a_wrong_byte_is_found_against_the_hub(hub: Hub, tmp_path: Path) -> None:
    build(tmp_path / "other", Spec("modelslim_dynamic", computable=True, seed=1))
    hub.commits[COMMIT] = tmp_path / "other"
    done = reshard("verify", tmp_path / "right", "--source", REPO, "--quiet")
    assert done.code == 3
    assert "bytes: " in done.out


def test_a_shard_set_on_the_hub_is_a_source(hub: Hub, tmp_path: Path) -> None:
    address = f"hf://{REPO}@tp2"
    assert reshard("inspect", REPO, "--revision", "tp2", "--format", "json").document["shard_set"]["tp_size"] == 2
    done = reshard("split", address, tmp_path / "tp4", "--tp", 4, "--quiet")
    assert done.code == 0, done.err
    split(tmp_path / "right", tmp_path / "tp4-right", Cut(4))
    same_files(tmp_path / "tp4", tmp_path / "tp4-right")
    done = reshard("merge", address, tmp_path / "merged", "--quiet")
    assert done.code == 0, done.err
    reshard("merge", tmp_path / "right", tmp_path / "merged-right", "--quiet")
    same_files(tmp_path / "merged", tmp_path / "merged-right")
    done = reshard("verify", address, "--source", REPO, "--quiet")
    assert done.code == 0, done.out + done.err
    (tmp_path / "right" / "config.json").write_text("{}")
    done = reshard("verify", address, "--quiet")
    assert done.code == 3
    assert "config.json" in done.out


def test_a_dry_run_reads_next_to_nothing(hub: Hub, tmp_path: Path) -> None:
    done = reshard("split", REPO, tmp_path / "out", "--tp", 2, "--dry-run", "--format", "json")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    assert hub.data_bytes < done.document["unsplit_bytes"] / 4


def test_killed_and_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is not fetched again, and of what was staged nothing is left."""
    out, staging = tmp_path / "out", tmp_path / "staging"
    staging.mkdir()
    monkeypatch.setenv("TMPDIR", str(staging))
    command = ("split", REPO, out, "--tp", 2, "--resume")
    first = reshard(*command, "--ranks", "0")
    assert first.code == 0, first.err
    begun = threading.Event()

    def hang(handler: Handler, asked: Asked) -> bool:
        if not asked.is_big:
            return False
        begun.set()
        return begun.wait()

    hub.fault = hang
    killed = interrupted(begun, *command, by=signal.SIGKILL, environment=elsewhere(hub))
    assert killed.code == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert list(staging.iterdir()) == []
    hub.fault = lambda handler, asked: False
    before = hub.data_bytes
    done = reshard(*command, "--format", "json")
    assert done.code == 0, done.err
    assert [shard["kept"] for shard in done.document["shards"]] == [True, False]
    same_but_for_the_origin(ORIGIN, out, tmp_path / "right")
    assert hub.data_bytes - before < 0.8 * done.document["unsplit_bytes"]
    assert list(staging.iterdir()) == []


def test_interrupted_while_a_server_lets_one_wait(hub: Hub, tmp_path: Path) -> None:
    """Ctrl-C does not wait for the end of a wait between tries."""
    answered = threading.Event()

    def busy(handler: Handler, asked: Asked) -> bool:
        if asked.is_weights:
            handler.answer(429, headers={"Retry-After": "300"})
            answered.set()
        return asked.is_weights

    hub.fault = busy
    done = interrupted(answered, "split", REPO, tmp_path / "out", "--tp", 2, line=True, environment=elsewhere(hub))
    assert done.code == 130, done.err
    assert re.fullmatch(rf"warning: {REPO}: \S+: HTTP 429 .*; again in 300 s\ninterrupted\n", done.err)
    assert not (tmp_path / "out").exists()


def test_interrupted_while_a_server_is_silent(hub: Hub, tmp_path: Path) -> None:
    """Ctrl-C does not wait for huggingface_hub's timeout, which may be long: not for a list of files, nor for bytes."""
    begun, ended = threading.Event(), threading.Event()

    def silent(handler: Handler, asked: Asked) -> bool:
        if asked.is_big:
            first, stop = asked.bounds
            size = (hub.commits[COMMIT] / asked.file).stat().st_size
            handler.send_response(206)
            handler.send_header("Content-Length", str(stop - first))
            handler.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
            handler.end_headers()
        elif hub.refs or not asked.path.startswith("/api/"):
            return False
        begun.set()
        return ended.wait()

    hub.fault = silent
    environment = elsewhere(hub, HF_HUB_DOWNLOAD_TIMEOUT="600")
    try:
        for refs in (hub.refs, {}):
            hub.refs = refs
            done = interrupted(begun, "split", REPO, tmp_path / "out", "--tp", 2, environment=environment)
            assert done.code == 130, done.err
            assert done.err == "interrupted\n"
            assert not (tmp_path / "out").exists()
            begun.clear()
    finally:
        ended.set()


def test_a_folder_of_that_name_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / REPO, Spec("bf16"))
    monkeypatch.chdir(tmp_path)
    done = reshard("inspect", REPO, "--format", "json")
    assert done.document["source"] == {"kind": "folder", "name": "model", "commit": None}
    refused = reshard("inspect", REPO, "--revision", "main")
    assert refused.code == 2
    assert "a folder has no revisions" in refused.err
    assert hub.asked == []
    named = reshard("inspect", f"hf://{REPO}", "--format", "json")
    assert named.document["source"]["kind"] == "hub"


def test_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_right"
    environment = elsewhere(hub, HF_HOME=str(tmp_path / "home"), HF_TOKEN="")
    without = reshard_process("inspect", REPO, **environment)
    assert without.code == 1
    assert without.err.count("\n") == 1
    assert "hf auth login" in without.err
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text("hf_right")
    logged_in = reshard_process("inspect", REPO, **environment)
    assert logged_in.code == 0, logged_in.err


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = reshard("inspect", REPO)
    assert done.code == 1
    assert re.match(r"error: org/model: no local folder with that name, and HF_HUB_OFFLINE forbids", done.err)
    assert done.err.count("\n") == 1


def test_an_endpoint_with_a_path(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub(hub.commits, prefix="/mirror/hf")) as mirror:
        use(mirror, monkeypatch)
        done = reshard("split", REPO, tmp_path / "out", "--tp", 2, "--quiet")
    assert done.code == 0, done.err
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")


@pytest.mark.parametrize(
    "endpoint", ["", "huggingface.co", "localhost:8000", "http://", "http://host:99999", "http://[::1"]
)
def test_an_endpoint_that_is_no_address(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    done = reshard("inspect", REPO)
    assert done.code == 1
    assert done.out == ""
    assert done.err == f"error: HF_ENDPOINT={endpoint}: is no hub's address; write it as https://HOST, or unset it\n"


def test_an_endpoint_with_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are put behind it, so it would be none; what it holds may be a secret."""
    monkeypatch.setenv("HF_ENDPOINT", "http://host/?token=a-secret")
    done = reshard("inspect", REPO)
    assert done.code == 1
    assert "is no hub's address; write it as https://HOST, or unset it" in done.err
    assert "a-secret" not in done.err


def _wants_a_client(installed: str, before: str = "", **environment: str) -> None:
    done = reshard_process("inspect", REPO, before=before, **environment)
    assert done.code == 1
    assert done.err.startswith(
        f"error: {REPO}: no local folder with that name, and a repository on the Hub needs huggingface_hub>=1.31, "
        f"which cannot be imported (installed is {installed}; "
    )
    assert done.err.endswith("): pip install 'huggingface_hub>=1.31'\n")


def test_an_engines_older_client(tmp_path: Path) -> None:
    """huggingface_hub 0.36, as far as it matters: it does not name its HTTP client. A folder needs none of it."""
    has = {
        "__init__": ("HfApi", "constants", "get_token", "hf_hub_url"),
        "errors": ("HFValidationError", "OfflineModeIsEnabled"),
        "utils": ("build_hf_headers", "get_session", "parse_ratelimit_headers"),
    }
    (tmp_path / "huggingface_hub").mkdir()
    for module, names in has.items():
        (tmp_path / "huggingface_hub" / f"{module}.py").write_text(" = ".join((*names, "None")))
    (tmp_path / "huggingface_hub-0.36.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: huggingface_hub\nVersion: 0.36.2\n"
    (tmp_path / "huggingface_hub-0.36.2.dist-info" / "METADATA").write_text(metadata)
    _wants_a_client("0.36.2", PYTHONPATH=str(tmp_path))
    build(tmp_path / "model", Spec())
    done = reshard_process("split", tmp_path / "model", tmp_path / "out", "--tp", 2, PYTHONPATH=str(tmp_path))
    assert done.code == 0, done.err


def test_no_client() -> None:
    _wants_a_client(
        "none",
        "import sys; from importlib import metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version; sys.modules['huggingface_hub'] = None",
    )


def test_where_nothing_can_be_staged(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other folder is taken in the place of the one that TMPDIR names."""
    (tmp_path / "file").touch()
    for place, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        monkeypatch.setenv("TMPDIR", str(tmp_path / place))
        done = reshard("split", REPO, tmp_path / "out", "--tp", 2, "--quiet")
        assert done.code == 1
        assert done.err == f"error: {tmp_path / place}: what is fetched cannot be staged there: {why}; check TMPDIR\n"
        assert not (tmp_path / "out").exists()


def test_revisions_that_contradict(tmp_path: Path) -> None:
    for arguments in (
        ("split", f"hf://{REPO}@v1", tmp_path / "out", "--tp", 2, "--revision", "v2"),
        ("verify", tmp_path, "--revision", "v1"),
        ("inspect", "memory://model", "--revision", "v1"),
        ("inspect", "hf://datasets/org/model"),
    ):
        done = reshard(*arguments)
        assert done.code == 2, done.err
        assert done.err.count("\n") == 1


def test_the_page_s_transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "sources.md").read_text()
    (block,) = re.findall(r"<!-- hub -->\n```text\n(.*?)```\n<!-- /hub -->", page, re.DOTALL)
    (synth,) = re.findall(r"^\$ reshard (synth .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert reshard(*shlex.split(synth)).code == 0
    with serving(Hub({COMMIT: tmp_path / "demo" / "model"})) as hub:
        use(hub, monkeypatch)
        for command, output in commands_of(block, r"^\$ reshard "):
            check_output(reshard(*shlex.split(command)), output)
