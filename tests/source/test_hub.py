"""The hub as a source: what is asked of a real server through the real client, and what faults do."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from reshard.errors import SourceError
from reshard.plan.pipeline import Cut, prepare
from reshard.source.hub import find_repository
from reshard.source.open import describe
from reshard.source.range_cache import StagedSource
from reshard.source.retry import RetryPolicy
from reshard.writer.split import SplitOptions, write_shards
from tests.support.builders import Spec, allowed_bytes, build
from tests.support.hub_server import COMMIT, ORIGIN, REPO, SECRET, Asked, Fault, Handler, Hub, serving
from tests.support.hub_source import Waits, opened
from tests.support.running import same_but_for_the_origin, split
from tests.support.sets import snapshot

MOVED = "2" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    build(tmp_path / "model", Spec("fp8_block"))
    with serving(Hub({COMMIT: tmp_path / "model"})) as running:
        yield running


def cut_from(hub: Hub, out: Path, **options: object) -> None:
    with opened(hub, **options) as source:  # type: ignore[arg-type]
        write_shards(prepare(source, Cut(2)), out, SplitOptions())


def times(count: int, answer: Callable[[Handler, Asked], None], wanted: Callable[[Asked], bool]) -> Fault:
    """Answer the first `count` requests for each path and end of a range so, and leave the rest to the server."""
    seen: Counter[tuple[str, str]] = Counter()

    def fault(handler: Handler, asked: Asked) -> bool:
        if not wanted(asked):
            return False
        with handler.hub.lock:
            key = asked.path, (asked.range or "").rpartition("-")[2]
            seen[key] += 1
            if seen[key] > count:
                return False
        answer(handler, asked)
        return True

    return fault


is_data, is_weights, is_anything = attrgetter("is_data"), attrgetter("is_weights"), lambda asked: True


@pytest.mark.parametrize("recipe", ["bf16", "fp8_block", "modelslim_dynamic", "ct_static"])
def test_the_set_is_the_folder_s_and_each_byte_is_served_once(tmp_path: Path, recipe: str) -> None:
    model = tmp_path / "model"
    build(model, Spec(recipe))
    split(model, tmp_path / "right", Cut(2))
    with serving(Hub({COMMIT: model})) as hub:
        with opened(hub) as source:
            prepared = prepare(source, Cut(2))
            write_shards(prepared, tmp_path / "out", SplitOptions())
            dense = prepared.checkpoint.nbytes
        same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
        headers = small = 0
        for path in model.iterdir():
            if path.suffix == ".safetensors":
                headers += 8 + 8 + int.from_bytes(path.read_bytes()[:8], "little")  # the length is read twice
            else:
                small += path.stat().st_size
        assert hub.data_bytes <= 1.02 * dense + headers + small
        assert hub.data_bytes >= dense
        served: Counter[tuple[str, int]] = Counter()
        for asked in hub.data_requests():
            first, stop = asked.bounds
            allowed = allowed_bytes(model)[asked.file]
            assert allowed[first:stop].all(), asked
            start = int(np.argmin(allowed)) if asked.is_weights else 0
            served.update((asked.file, at) for at in range(max(first, start), stop))
        assert set(served.values()) == {1}


def test_one_description_and_ranges_in_parallel_over_one_commit(hub: Hub, tmp_path: Path) -> None:
    cut_from(hub, tmp_path / "out")
    paths = [asked.path for asked in hub.asked if not asked.is_data]
    assert [p for p in paths if p.startswith("/api/")] == [f"/api/models/{REPO}"]
    assert all(p.startswith((f"/{REPO}/resolve/{COMMIT}/", "/api/")) for p in paths)
    assert all(asked.agent.startswith("reshard/") for asked in hub.asked if not asked.is_data)


def test_what_is_inspected_is_headers_only(hub: Hub) -> None:
    with opened(hub, revision="main") as source:
        assert describe(source).identity.commit == COMMIT
        assert "figures/benchmark.jpg" not in source.files()
    assert hub.data_bytes < 60_000
    assert hub.asked[0].path == f"/api/models/{REPO}/revision/main"


@pytest.mark.parametrize(("status", "headers"), [(503, {}), (500, {}), (408, {})])
def test_a_server_that_fails_is_asked_again(hub: Hub, tmp_path: Path, status: int, headers: dict[str, str]) -> None:
    hub.fault = times(2, lambda handler, asked: handler.answer(status, headers=headers), is_anything)
    waits, lines = Waits(), list[str]()
    cut_from(hub, tmp_path / "out", waits=waits, lines=lines)
    split(hub.commits[COMMIT], tmp_path / "right", Cut(2))
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
    assert set(waits) >= {1.0, 2.0}
    assert max(waits) <= 30.0
    assert lines[0].startswith(f"{REPO}: HTTP {status}")
    assert lines[0].endswith("again in 1 s")


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry-After": "17"}, 17.0),
        ({"RateLimit": '"resolvers";r=0;t=41', "Retry-After": "3"}, 41.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.0),
        ({"Retry-After": "0"}, 1.0),
        ({"Retry-After": "soon"}, 1.0),
        ({"Retry-After": "\xb2"}, 1.0),
        ({"Retry-After": "-5"}, 1.0),
        ({"Retry-After": "5 apples"}, 1.0),
        ({"Retry-After": "Fri, 99 Foo 99999 99:99:99 GMT"}, 1.0),
        ({"Retry-After": "Mon, 01 Jan 0001 00:00:00 +2359"}, 1.0),
        ({"RateLimit": '"api";r=0;t=-9', "Retry-After": "3"}, 3.0),
        ({}, 1.0),
    ],
)
def test_how_long_a_busy_server_asks_to_wait_is_honoured(
    hub: Hub, tmp_path: Path, headers: dict[str, str], wait: float
) -> None:
    hub.fault = times(1, lambda handler, asked: handler.answer(429, headers=headers), is_data)
    waits = Waits()
    cut_from(hub, tmp_path / "out", waits=waits)
    assert set(waits) == {wait}
    assert len(waits) == len({(asked.file, asked.range) for asked in hub.data_requests()})


def test_a_date_to_wait_for_is_honoured(hub: Hub, tmp_path: Path) -> None:
    headers = {"Retry-After": formatdate(time.time() + 500, usegmt=True)}
    hub.fault = times(1, lambda handler, asked: handler.answer(429, headers=headers), is_data)
    waits = Waits()
    cut_from(hub, tmp_path / "out", waits=waits)
    assert 300 < min(waits) <= max(waits) <= 500


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "86400"}, 86400),
        ({"Retry-After": "9" * 5000}, 999_999_999_999),
        ({"RateLimit": f'"api";r=0;t={"9" * 5000}'}, 999_999_999_999),
    ],
)
def test_a_wait_that_is_too_long_is_told_and_not_waited(hub: Hub, headers: dict[str, str], seconds: int) -> None:
    hub.fault = times(1, lambda handler, asked: handler.answer(429, headers=headers), is_data)
    waits = Waits()
    with (
        pytest.raises(SourceError, match=rf"HTTP 429 .*asks to wait {seconds} s: try again then"),
        opened(hub, waits=waits) as source,
    ):
        describe(source)
    assert waits == []


def test_a_connection_cut_in_the_middle_goes_on_where_it_broke(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("bf16", hidden=512, intermediate=1024))

    def cut(handler: Handler, asked: Asked) -> None:
        """Half of what is asked for, at least one byte."""
        first, stop = asked.bounds
        data = (handler.hub.commits[COMMIT] / asked.file).read_bytes()
        headers = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}
        handler.answer(206, data[first:stop], headers, cut=max(1, (stop - first) // 2))

    with serving(Hub({COMMIT: tmp_path / "model"})) as hub:
        with opened(hub) as source:
            dense = describe(source).nbytes
        before = hub.data_bytes
        hub.fault = times(1, cut, is_weights)
        cut_from(hub, tmp_path / "out")
        split(tmp_path / "model", tmp_path / "right", Cut(2))
        same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
        assert hub.data_bytes - before <= 1.02 * dense + before


def test_a_range_answered_with_the_whole_file_is_not_taken(hub: Hub, tmp_path: Path) -> None:
    def whole(handler: Handler, asked: Asked) -> None:
        handler.answer(200, (handler.hub.commits[COMMIT] / asked.file).read_bytes())

    hub.fault = times(1, whole, is_weights)
    cut_from(hub, tmp_path / "out")
    split(hub.commits[COMMIT], tmp_path / "right", Cut(2))
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")
    hub.fault = times(1000, whole, is_weights)
    with pytest.raises(SourceError, match=r"answers the range \d{3,} to \d+ with the whole file; given up after 3"):
        cut_from(hub, tmp_path / "other")


def test_a_small_file_that_comes_whole_is_what_was_asked_for(hub: Hub) -> None:
    def whole(handler: Handler, asked: Asked) -> None:
        handler.answer(200, (handler.hub.commits[COMMIT] / asked.file).read_bytes())

    hub.fault = times(1000, whole, lambda asked: asked.is_data and asked.file == "config.json")
    waits = Waits()
    with opened(hub, waits=waits) as source:
        describe(source)
    assert waits == []


@pytest.mark.parametrize(
    ("length", "headers", "said"),
    [
        (8, {"Content-Range": "bytes 1-8/{size}"}, "answers with bytes 1-8/"),
        (8, {"Content-Range": "bytes 0-7/999999999"}, "answers with bytes 0-7/999999999, expected bytes 0-7/"),
        (8, {"Content-Range": "bytes 0-7/{size}", "Content-Encoding": "gzip"}, "encoded as gzip"),
        (8, {}, "answers with no Content-Range"),
        (3, {"Content-Range": "bytes 0-7/{size}"}, "the answer has 3 bytes, expected 8"),
        (9, {"Content-Range": "bytes 0-7/{size}"}, "the answer has 9 bytes, expected 8"),
    ],
)
def test_an_answer_that_is_not_the_range_is_not_taken(
    hub: Hub, tmp_path: Path, length: int, headers: dict[str, str], said: str
) -> None:
    def wrong(handler: Handler, asked: Asked) -> None:
        size = (handler.hub.commits[COMMIT] / asked.file).stat().st_size
        handler.answer(206, b"\xff" * length, {name: value.format(size=size) for name, value in headers.items()})

    hub.fault = times(1000, wrong, lambda asked: asked.is_weights and asked.range == "bytes=0-7")
    with pytest.raises(SourceError) as raised:
        cut_from(hub, tmp_path / "out")
    assert said in str(raised.value)
    assert "given up after 3 tries" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_branch_that_moves_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    build(tmp_path / "moved", Spec("fp8_block", seed=1))
    hub.commits[MOVED] = tmp_path / "moved"
    with opened(hub, revision="main") as source:
        prepared = prepare(source, Cut(2))
        hub.refs["main"] = MOVED
        write_shards(prepared, tmp_path / "out", SplitOptions())
    split(hub.commits[COMMIT], tmp_path / "right", Cut(2))
    same_but_for_the_origin(ORIGIN, tmp_path / "out", tmp_path / "right")


def test_a_mirror_that_answers_with_another_commit_is_refused(hub: Hub, tmp_path: Path) -> None:
    def other(handler: Handler, asked: Asked) -> bool:
        if "/resolve/" not in asked.path:
            return False
        handler.answer(302, headers={"Location": f"{hub.store}/blobs/{COMMIT}/{asked.file}", "X-Repo-Commit": MOVED})
        return True

    hub.fault = other
    with pytest.raises(SourceError, match=f"the answer is of commit {MOVED}, {COMMIT} was asked for"):
        cut_from(hub, tmp_path / "out")


def test_the_body_of_a_redirect_is_not_read_to_its_end(hub: Hub, tmp_path: Path) -> None:
    sent = 0

    def endless(handler: Handler, asked: Asked) -> bool:
        nonlocal sent
        if "/resolve/" not in asked.path:
            return False
        where = {"Location": f"{hub.store}/blobs/{COMMIT}/{asked.file}", "Content-Length": str(1 << 40)}
        with contextlib.suppress(OSError):  # the client hangs up
            handler.answer(302, headers=where)
            while sent < 1 << 30:
                sent += handler.wfile.write(bytes(1 << 16))
        handler.close_connection = True
        return True

    hub.fault = endless
    cut_from(hub, tmp_path / "out")
    hub.fault = lambda handler, asked: False
    cut_from(hub, tmp_path / "right")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "right")
    assert 0 < sent < 1 << 28


def test_a_mirror_s_file_that_changes_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    """Under the same commit, in the same size and with the same header."""
    build(tmp_path / "changed", Spec("fp8_block", seed=1))
    with opened(hub) as source:
        prepared = prepare(source, Cut(2))
        hub.commits[COMMIT] = tmp_path / "changed"
        with pytest.raises(SourceError, match=r"safetensors: has changed since it was first read \(it had ETag "):
            write_shards(prepared, tmp_path / "out", SplitOptions())
    assert not (tmp_path / "out").exists()


def test_an_endless_fault_ends_in_one_line_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    with opened(hub) as source:
        prepared = prepare(source, Cut(2))
        hub.fault = times(1000, lambda handler, asked: handler.answer(503), is_anything)
        with pytest.raises(SourceError) as raised:
            write_shards(prepared, tmp_path / "out", SplitOptions())
    assert str(raised.value).startswith(f"{REPO}: model-")
    assert "HTTP 503" in str(raised.value)
    assert "given up after 6 tries" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gated", [False, True])
def test_a_private_repository_says_how_to_log_in(hub: Hub, monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    hub.token, hub.gated = "hf_right", gated
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    with pytest.raises(SourceError, match=r"hf auth login.*HF_TOKEN") as raised:
        describe(opened(hub))
    assert ("gated" in str(raised.value)) == gated
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SourceError, match="take a token that may read it") as raised:
        describe(opened(hub))
    assert "hf_wrong" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with opened(hub) as source:
        describe(source)
    assert {asked.authorization for asked in hub.data_requests()} == {None}


def test_a_token_that_is_not_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.fault = times(1, lambda handler, asked: handler.answer(401, headers=said), is_anything)
    with pytest.raises(SourceError, match=r"\(HTTP 401, Invalid credentials in Authorization header\): check the name"):
        opened(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_…")
    with pytest.raises(SourceError, match="account's token has characters that no token has; check HF_TOKEN"):
        opened(hub)


def test_a_file_that_may_not_be_read(hub: Hub) -> None:
    hub.fault = times(1000, lambda handler, asked: handler.answer(403), lambda asked: "/resolve/" in asked.path)
    with pytest.raises(SourceError, match=r"is listed and may not be read \(HTTP 403\): ") as raised:
        describe(opened(hub))
    assert "no such repository" not in str(raised.value)


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="org/model: has no revision v2; name a branch, tag or commit that it has"):
        opened(hub, revision="v2")
    with pytest.raises(SourceError, match=r"org/other: no local folder with that name, and .*knows no such repository"):
        StagedSource("org/other", partial(find_repository, "org/other", None, hub.url), RetryPolicy(), print)
    with opened(hub) as source:
        (hub.commits[COMMIT] / "config.json").rename(tmp_path / "away")
        with pytest.raises(SourceError, match=r"config\.json: is listed and not there"):
            describe(source)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"sha": 5}', b"{}"])
def test_what_is_no_hub(hub: Hub, body: bytes) -> None:
    hub.fault = times(1, lambda handler, asked: handler.answer(200, body), is_anything)
    with pytest.raises(SourceError, match="is HF_ENDPOINT a hub"):
        opened(hub)


def test_a_mirror_that_gives_no_sizes(hub: Hub) -> None:
    body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": "model.safetensors"}]}).encode()
    hub.fault = times(1, lambda handler, asked: handler.answer(200, body), is_anything)
    with pytest.raises(SourceError, match=r"model\.safetensors: the server does not say its size"):
        opened(hub)


def test_nobody_answers() -> None:
    with pytest.raises(SourceError, match=r"http://127.0.0.1:9 cannot be reached .*check the name, the network"):
        StagedSource(REPO, partial(find_repository, REPO, None, "http://127.0.0.1:9"), RetryPolicy(), print)


def test_signatures_stay_out_of_messages(hub: Hub) -> None:
    hub.fault = times(1000, lambda handler, asked: handler.answer(403), is_data)
    with pytest.raises(SourceError) as raised:
        describe(opened(hub))
    assert SECRET not in str(raised.value)
