"""Folders on HTTP servers, by fsspec: servers of other kinds than the hub."""

import contextlib
import hashlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from reshard.errors import SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.open import describe, open_source
from reshard.source.retry import RetryPolicy
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, build
from tests.support.running import interrupted, reshard, same_but_for_the_origin, split

Fault = Callable[["Folder", str], bool]


class Folder(http.server.SimpleHTTPRequestHandler):
    """Python's own server, with ETags and, by `ranges`, ranges; a fault may answer in its place."""

    protocol_version = "HTTP/1.1"
    ranges = True
    fault: Fault | None = None

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if type(self).fault and type(self).fault(self, wanted):  # type: ignore[misc]
            return
        if not self.ranges or match is None or not path.is_file():
            super().do_GET()
            return
        first, last = int(match[1]), int(match[2])
        self.begin(206, last - first + 1, {"Content-Range": f"bytes {first}-{last}/{path.stat().st_size}"})
        self.wfile.write(path.read_bytes()[first : last + 1])

    def do_HEAD(self) -> None:
        if not (type(self).fault and type(self).fault(self, "")):  # type: ignore[misc]
            super().do_HEAD()

    def begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


class Quiet(http.server.ThreadingHTTPServer):
    """Whose clients may hang up."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing on stderr."""


@contextmanager
def serving(folder: Path, *, ranges: bool = True, fault: Fault | None = None) -> Iterator[str]:
    """The folder's address, while the block runs."""
    handler = type("Bound", (Folder,), {"ranges": ranges, "fault": staticmethod(fault) if fault else None})
    server = Quiet(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build(tmp_path / "site" / "model", Spec("fp8_block"))
    return tmp_path / "site" / "model"


def is_big(wanted: str) -> bool:
    """A range of a weight, not a header's."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
    return match is not None and int(match[2]) - int(match[1]) > 50_000


def test_a_checkpoint_on_a_server(model: Path, tmp_path: Path) -> None:
    split(model, tmp_path / "right", Cut(2))
    with serving(model.parent) as url, open_source(f"{url}/model") as source:
        write_shards(prepare(source, Cut(2)), tmp_path / "out", SplitOptions())
    same_but_for_the_origin({"kind": "remote"}, tmp_path / "out", tmp_path / "right")
    assert "127.0.0.1" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_password_in_an_address_is_not_repeated(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("fp8_block", computable=True))
    out = tmp_path / "out"
    with serving(tmp_path) as url:
        address = url.replace("//", "//user:secret@") + "/model"
        runs = [
            (0, reshard("split", address, out, "--tp", 2)),
            (0, reshard("verify", out, "--source", address)),
            (0, reshard("check", out, "--against", address)),
            (3, reshard("check", address, "--tp", "5", "--format", "junit")),
            (1, reshard("check", f"{address}s", out, "--against", address)),
            (1, reshard("inspect", f"{address}s")),
            (3, reshard("check", address, "--scheme", "bf16", "--tp", 2)),
            (2, reshard("check", address, "--against", address)),
        ]
        for code, done in runs:
            assert done.code == code, done.out + done.err
            assert "secret" not in done.out + done.err
    assert "secret" not in (out / "manifest.json").read_text()


def test_a_server_that_knows_no_ranges(model: Path) -> None:
    """It is not asked again and again, and no whole file is taken into memory."""
    waits: list[float] = []
    policy = RetryPolicy(sleep=waits.append)
    with serving(model.parent, ranges=False) as url, open_source(f"{url}/model", policy=policy) as source:
        describe(source)  # from the start of each file
        with pytest.raises(SourceError, match=r"safetensors: .*the server gives whole files only; copy the files"):
            prepare(source, Cut(2))
    assert waits == []


def test_a_file_that_changes_is_not_mixed(model: Path, tmp_path: Path) -> None:
    """In the same size and with the same header."""
    build(tmp_path / "other", Spec("fp8_block", seed=1))
    with serving(model.parent) as url, open_source(f"{url}/model") as source:
        prepared = prepare(source, Cut(2))
        for file in model.glob("*.safetensors"):
            file.write_bytes((tmp_path / "other" / file.name).read_bytes())
        with pytest.raises(SourceError, match=r"has changed since it was first read \(it had ETag "):
            write_shards(prepared, tmp_path / "out", SplitOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize(("status", "passes"), [(503, True), (429, True), (403, False), (404, False)])
def test_which_answers_are_worth_another_try(
    model: Path, tmp_path: Path, status: int, passes: bool, look: bool
) -> None:
    """To the first range of weights, or to the first look at a file, which asks for a byte."""
    asked = 0

    def refuse(handler: Folder, wanted: str) -> bool:
        nonlocal asked
        meant = handler.path.endswith(".safetensors") and wanted == "bytes=0-0" if look else is_big(wanted)
        asked += meant
        if not meant or asked > 1:
            return False
        handler.begin(status, 0, {})
        return True

    waits: list[float] = []
    policy = RetryPolicy(sleep=waits.append)
    said = rf"safetensors: cannot be read: HTTP {status}"
    if status == 404:
        said = r"safetensors: is listed and not there \(HTTP 404\)"
    refused = pytest.raises(SourceError, match=said)
    with (
        serving(model.parent, fault=refuse) as url,
        contextlib.nullcontext() if passes else refused,
        open_source(f"{url}/model", policy=policy) as source,
    ):
        write_shards(prepare(source, Cut(2)), tmp_path / "out", SplitOptions())
    assert asked > 0
    assert waits == ([1.0] if passes else [])


def test_interrupted_while_a_server_is_silent(model: Path, tmp_path: Path) -> None:
    """Ctrl-C does not wait for a time-out."""
    begun, ended = threading.Event(), threading.Event()

    def silent(handler: Folder, wanted: str) -> bool:
        if not is_big(wanted):
            return False
        begun.set()
        ended.wait()
        return True

    with serving(model.parent, fault=silent) as url:
        try:
            done = interrupted(begun, "split", f"{url}/model", tmp_path / "out", "--tp", 2)
        finally:
            ended.set()
    assert done.code == 130, done.err
    assert done.err == "interrupted\n"
    assert not (tmp_path / "out").exists()
