"""The command line with an address on the hub, in processes of their own: HF_ENDPOINT is read when they start."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reshard.plan.pipeline import Cut
from tests.project.test_docs import steady
from tests.source.test_hub import ORIGIN, is_weights
from tests.support.builders import Spec, build
from tests.support.faults import ROOT
from tests.support.hub_server import COMMIT, REPO, Asked, Handler, Hub, serving
from tests.support.running import Done, interrupted, reshard, reshard_process, same_but_for_the_origin, split

SET_COMMIT = "3" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Commit 1, main, is a checkpoint, 3 its shard set."""
    build(tmp_path / "model", Spec("modelslim_dynamic", computable=True))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    commits = {COMMIT: tmp_path / "model", SET_COMMIT: tmp_path / "right"}
    with serving(Hub(commits, {"main": COMMIT, "tp2": SET_COMMIT})) as running:
        yield running


def run(hub: Hub, *arguments: object, **environment: str) -> Done:
    return reshard_process(*arguments, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", **environment)


def test_a_checkpoint_is_inspected_split_and_verified(hub: Hub, tmp_path: Path) -> None:
    seen = run(hub, "inspect", REPO, "--format", "json")
    assert seen.code == 0, seen.err
    assert seen.document["source"] == {"kind": "hub", "name": REPO, "commit": COMMIT}
    done = run(hub, "split", REPO, tmp_path / "out", "--tp", 2, "--revision", "main")
    assert done.code == 0, done.err
    assert re.search(r"^split: \S+ \S+ in \S+ s", done.err, re.MULTILINE)
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
    checked = run(hub, "verify", tmp_path / "out", "--source", REPO, "--revision", COMMIT, "--quiet")
    assert checked.code == 0, checked.out + checked.err
    assert f"every byte is {REPO}'s" in checked.out


def test_a_revision_is_checked_and_estimated(hub: Hub) -> None:
    """main is a checkpoint, tp2 its shard set."""
    for revision, kind in (("main", "checkpoint"), ("tp2", "shard set")):
        done = run(hub, "check", REPO, "--revision", revision, "--format", "json")
        assert done.code == 0, done.err
        assert done.document["targets"][0]["kind"] == kind
    assert run(hub, "check", REPO, "--revision", "none").code == 1
    done = run(hub, "estimate", REPO, "--revision", "tp2", "--tp", 1, "--format", "json")
    assert done.code == 0, done.err
    assert done.document["source"] == "model"  # what the set was cut from
    for command in (("check",), ("estimate", "--tp", 1)):
        done = run(hub, *command, "--config", ROOT / "configs" / "deepseek-r1.json", "--revision", "main")
        assert done.code == 2
        assert "--revision goes with a hub repository, which " in done.err


def test_a_wrong_byte_is_found_against_the_hub(hub: Hub, tmp_path: Path) -> None:
    build(tmp_path / "other", Spec("modelslim_dynamic", computable=True, seed=1))
    hub.commits[COMMIT] = tmp_path / "other"
    done = run(hub, "verify", tmp_path / "right", "--source", REPO, "--quiet")
    assert done.code == 3
    assert "bytes: " in done.out


def test_a_shard_set_on_the_hub_is_a_source(hub: Hub, tmp_path: Path) -> None:
    address = f"hf://{REPO}@tp2"
    assert run(hub, "inspect", REPO, "--revision", "tp2", "--format", "json").document["shard_set"]["tp_size"] == 2
    done = run(hub, "split", address, tmp_path / "tp4", "--tp", 4, "--quiet")
    assert done.code == 0, done.err
    split(tmp_path / "right", tmp_path / "tp4-right", Cut(4))
    for path in (tmp_path / "tp4-right").iterdir():
        assert (tmp_path / "tp4" / path.name).read_bytes() == path.read_bytes(), path.name
    done = run(hub, "merge", address, tmp_path / "merged", "--quiet")
    assert done.code == 0, done.err
    reshard("merge", tmp_path / "right", tmp_path / "merged-right", "--quiet")
    for path in (tmp_path / "merged-right").iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    done = run(hub, "verify", address, "--source", REPO, "--quiet")
    assert done.code == 0, done.out + done.err
    (tmp_path / "right" / "config.json").write_text("{}")
    done = run(hub, "verify", address, "--quiet")
    assert done.code == 3
    assert "config.json" in done.out


def test_a_dry_run_reads_next_to_nothing(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, "split", REPO, tmp_path / "out", "--tp", 2, "--dry-run", "--format", "json")
    assert done.code == 0, done.err
    assert not (tmp_path / "out").exists()
    assert hub.data_bytes < done.document["unsplit_bytes"] / 4


def test_killed_and_resumed(hub: Hub, tmp_path: Path) -> None:
    """What is finished is not fetched again, and of what was staged nothing is left."""
    out, staging = tmp_path / "out", tmp_path / "staging"
    staging.mkdir()
    command = ("split", REPO, out, "--tp", 2, "--resume")
    first = run(hub, *command, "--ranks", "0", TMPDIR=str(staging))
    assert first.code == 0, first.err
    started = threading.Event()

    def kill(handler: Handler, asked: Asked) -> bool:
        first, last = (int(n) for n in (asked.range or "0-0").removeprefix("bytes=").split("-"))
        if not is_weights(asked) or last - first < 50_000:
            return False
        assert started.wait(60)
        process.kill()
        return True

    hub.fault = kill
    code = "from reshard.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "TMPDIR": str(staging)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    started.set()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    assert list(staging.iterdir()) == []
    hub.fault = lambda handler, asked: False
    before = hub.data_bytes
    done = run(hub, *command, "--format", "json", TMPDIR=str(staging))
    assert done.code == 0, done.err
    assert [shard["kept"] for shard in done.document["shards"]] == [True, False]
    same_but_for_the_origin(ORIGIN, out, tmp_path / "right")
    fetched = hub.data_bytes - before
    assert fetched < 0.8 * done.document["unsplit_bytes"]
    assert list(staging.iterdir()) == []


def test_interrupted_while_a_server_lets_one_wait(hub: Hub, tmp_path: Path) -> None:
    """Ctrl-C does not wait for the end of the patience."""
    asked_for = threading.Event()

    def busy(handler: Handler, asked: Asked) -> bool:
        if not is_weights(asked):
            return False
        handler.answer(429, headers={"Retry-After": "300"})
        asked_for.set()
        return True

    hub.fault = busy
    code = "from reshard.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "split", REPO, str(tmp_path / "out"), "--tp", "2"],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asked_for.wait(60), "the server was not asked for weights within 60 s"
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "HTTP 429" in line
    assert line.endswith("again in 300 s\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not (tmp_path / "out").exists()


def test_interrupted_while_a_server_is_silent(hub: Hub, tmp_path: Path) -> None:
    """Ctrl-C does not wait for huggingface_hub's timeout, which may be long."""
    begun, ended = threading.Event(), threading.Event()

    def silent(handler: Handler, asked: Asked) -> bool:
        first, last = (int(n) for n in (asked.range or "0-0").removeprefix("bytes=").split("-"))
        if not is_weights(asked) or last - first < 50_000:
            return False
        size = (hub.commits[COMMIT] / asked.file).stat().st_size
        handler.send_response(206)
        handler.send_header("Content-Length", str(last - first + 1))
        handler.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        handler.end_headers()
        begun.set()
        ended.wait()
        return True

    hub.fault = silent
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    try:
        done = interrupted(begun, "split", REPO, tmp_path / "out", "--tp", 2, **environment)
    finally:
        ended.set()
    assert done.code == 130, done.err
    assert done.err == "interrupted\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_that_name_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / REPO, Spec("bf16"))
    monkeypatch.chdir(tmp_path)
    done = run(hub, "inspect", REPO, "--format", "json")
    assert done.document["source"] == {"kind": "folder", "name": "model", "commit": None}
    refused = run(hub, "inspect", REPO, "--revision", "main")
    assert refused.code == 2
    assert "a folder has no revisions" in refused.err
    assert hub.asked == []
    named = run(hub, "inspect", f"hf://{REPO}", "--format", "json")
    assert named.document["source"]["kind"] == "hub"


def test_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_right"
    without = run(hub, "inspect", REPO, HF_HOME=str(tmp_path / "home"), HF_TOKEN="")
    assert without.code == 1
    assert without.err.count("\n") == 1
    assert "hf auth login" in without.err
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text("hf_right")
    logged_in = run(hub, "inspect", REPO, HF_HOME=str(tmp_path / "home"), HF_TOKEN="")
    assert logged_in.code == 0, logged_in.err


def test_offline(tmp_path: Path) -> None:
    done = reshard_process("inspect", REPO, HF_HUB_OFFLINE="1")
    assert done.code == 1
    assert re.match(r"error: org/model: no local folder with that name, and HF_HUB_OFFLINE forbids", done.err)
    assert done.err.count("\n") == 1


def test_an_endpoint_with_a_path(hub: Hub, tmp_path: Path) -> None:
    with serving(Hub(hub.commits, prefix="/mirror/hf")) as mirror:
        done = run(mirror, "split", REPO, tmp_path / "out", "--tp", 2, "--quiet")
    assert done.code == 0, done.err
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")


@pytest.mark.parametrize(
    "endpoint", ["", "huggingface.co", "localhost:8000", "http://", "http://host:99999", "http://[::1"]
)
def test_an_endpoint_that_is_no_address(endpoint: str) -> None:
    done = reshard_process("inspect", REPO, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert done.code == 1
    assert done.out == ""
    assert done.err == f"error: HF_ENDPOINT={endpoint}: is no hub's address; write it as https://HOST, or unset it\n"


def _wants_a_client(installed: str, before: str = "", **environment: str) -> None:
    done = reshard_process("inspect", REPO, before=before, **environment)
    assert done.code == 1
    assert done.err.startswith(
        f"error: {REPO}: no local folder with that name, and a repository on the Hub is read with huggingface_hub "
        f"1.31 or later, installed is {installed} ("
    )
    assert done.err.endswith("; pip install -U 'huggingface_hub>=1.31'\n")


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


def test_where_nothing_can_be_staged(hub: Hub, tmp_path: Path) -> None:
    """No other folder is taken in the place of the one that TMPDIR names."""
    (tmp_path / "file").touch()
    for place, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        done = run(hub, "split", REPO, tmp_path / "out", "--tp", 2, "--quiet", TMPDIR=str(tmp_path / place))
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


def test_the_readme_s_transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"<!-- hub -->\n```text\n(.*?)```\n<!-- /hub -->", readme, re.DOTALL)
    (synth,) = re.findall(r"^\$ reshard (synth .*)$", readme, re.MULTILINE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert reshard(*shlex.split(synth)).code == 0
    with serving(Hub({COMMIT: tmp_path / "demo" / "model"})) as hub:
        for part in re.split(r"^\$ reshard ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            done = run(hub, *shlex.split(command))
            said = "\n".join(line.rstrip() for line in (done.out + done.err).splitlines())
            assert steady(said) == steady(output.rstrip()), command
