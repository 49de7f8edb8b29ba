"""Servers that answer something else than was asked for, or without an end: one line and exit 1, never other bytes."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

from reshard import limits
from reshard.plan.pipeline import Cut
from reshard.source import hub as hub_module
from reshard.source import open as open_module
from reshard.source.hub import find_repository
from reshard.source.retry import RetryPolicy
from tests.support.builders import Spec, build
from tests.support.certificate import make as make_certificate
from tests.support.hub_server import COMMIT, REPO, Asked, Handler, Hub, serving
from tests.support.running import Done, reshard, reshard_process, same_but_for_the_origin, split
from tests.support.s3 import environment as s3_environment

Answer = Callable[[Handler, Asked], None]
SOURCES = ("hub", "server")
WITH_S3 = (*SOURCES, "s3")
PEAK_MIB = 300  # of a process that imports huggingface_hub and numpy: 100


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, `model`, and its set, `right`."""
    folder = tmp_path_factory.mktemp("built")
    build(folder / "model", Spec("fp8_block", files=1, computable=True))
    split(folder / "model", folder / "right", Cut(2))
    return folder


@pytest.fixture
def hub(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """This process's hub; its store is a plain server, too. No wait between tries takes time."""
    monkeypatch.setattr(open_module, "RetryPolicy", partial(RetryPolicy, sleep=lambda seconds: None))
    with serving(Hub({COMMIT: built / "model"})) as running:
        for name, value in s3_environment(running.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(hub_module, "find_repository", partial(find_repository, endpoint=running.url))
        yield running


def address(hub: Hub, source: str) -> str:
    return {"hub": REPO, "server": hub.page, "s3": f"s3://blobs/{COMMIT}"}[source]


def refused(done: Done, said: str) -> None:
    assert done.code == 1, done.out + done.err
    errors = [line for line in done.err.splitlines() if not line.startswith(("warning: ", "digests: "))]
    assert len(errors) == 1, done.err
    assert re.match(rf"error: .*{said}", errors[0]), errors[0]
    assert len(errors[0]) < 5000


def hostile(answer: Answer, meant: Callable[[Asked], bool]) -> Callable[[Handler, Asked], bool]:
    def fault(handler: Handler, asked: Asked) -> bool:
        if meant(asked):
            answer(handler, asked)
        return meant(asked)

    return fault


def file_of(handler: Handler, asked: Asked) -> bytes:
    return (handler.hub.commits[COMMIT] / asked.file).read_bytes()


def head(handler: Handler, asked: Asked, *, by: int = 0, total: int = 0, **headers: str) -> dict[str, str]:
    """Of the range that was asked for, or `by` bytes further on, or of a file that is so much larger."""
    first, stop = asked.bounds
    data = file_of(handler, asked)
    return {
        "Content-Range": f"bytes {first + by}-{stop - 1 + by}/{len(data) + total}",
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }


def asked_for(handler: Handler, asked: Asked, by: int = 0) -> bytes:
    first, stop = asked.bounds
    return file_of(handler, asked)[first + by : stop + by]


def shifted(handler: Handler, asked: Asked) -> None:
    handler.answer(206, asked_for(handler, asked, -2), head(handler, asked, by=-2))


def no_content_range(handler: Handler, asked: Asked) -> None:
    handler.answer(206, asked_for(handler, asked, -2))


def several_parts(handler: Handler, asked: Asked) -> None:
    part = b"--x\r\n\r\n" + asked_for(handler, asked) + b"\r\n--x--"
    handler.answer(206, part, {"Content-Type": "multipart/byteranges; boundary=x"})


def other_total(handler: Handler, asked: Asked) -> None:
    handler.answer(206, asked_for(handler, asked), head(handler, asked, total=1))


def shorter(handler: Handler, asked: Asked) -> None:
    handler.answer(206, asked_for(handler, asked)[:-1], head(handler, asked))


def longer(handler: Handler, asked: Asked) -> None:
    handler.answer(206, asked_for(handler, asked) + b"\0", head(handler, asked))


def compressed(handler: Handler, asked: Asked) -> None:
    body = gzip.compress(asked_for(handler, asked))
    padded = body.ljust(len(asked_for(handler, asked)), b"\0")
    handler.answer(206, padded, head(handler, asked, Content_Encoding="gzip"))


def without_end(handler: Handler, asked: Asked) -> None:
    handler.endless(206, head(handler, asked), bytes(1 << 20))


def byte_by_byte(handler: Handler, asked: Asked) -> None:
    handler.endless(206, head(handler, asked), b"\0", pause=0.05)


def silent(handler: Handler, asked: Asked) -> None:
    handler.hub.over.wait()


def whole_file(handler: Handler, asked: Asked) -> None:
    handler.answer(200, file_of(handler, asked))


def another_whole_file(handler: Handler, asked: Asked) -> None:
    handler.answer(200, file_of(handler, asked) + b"\0")


def broken_off(handler: Handler, asked: Asked) -> None:
    """Always after a byte."""
    handler.answer(206, asked_for(handler, asked), head(handler, asked), cut=1)


def no_chunks(handler: Handler, asked: Asked) -> None:
    handler.close_connection = True
    handler.send_response(206)
    for name, value in head(handler, asked, Transfer_Encoding="chunked").items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(b"no number\r\n")


def with_etag(etag: str | None) -> Answer:
    def answer(handler: Handler, asked: Asked) -> None:
        headers = head(handler, asked)
        del headers["ETag"]
        handler.answer(206, asked_for(handler, asked), headers | {"ETag": etag} if etag else headers)

    return answer


def to(location: str) -> Answer:
    def answer(handler: Handler, asked: Asked) -> None:
        handler.answer(302, headers={"Location": location.format(path=handler.path)})

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler, asked: Asked) -> None:
        handler.answer(code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


# (the answer to each range of weights, what is said of it)
WRONG: dict[str, tuple[Answer, str]] = {
    "another range": (shifted, "the server answers with bytes .*, expected bytes .*given up after 3 tries"),
    "another range, not told": (no_content_range, "the server answers with no Content-Range"),
    "several ranges": (several_parts, "the server answers with no Content-Range"),
    "another total": (other_total, "the server answers with bytes .*, expected bytes "),
    "a shorter body": (shorter, r"the answer has \d+ bytes, expected \d+"),
    "a longer body": (longer, r"the answer has \d+ bytes, expected \d+"),
    "compressed": (compressed, "the answer is encoded as gzip, identity was asked for"),
    "no end": (without_end, r"the answer is longer than the \d+ bytes asked for"),
    "byte by byte": (byte_by_byte, r"\d+ bytes in 0.3 s: too slow; given up after 3 tries"),
    "silence": (silent, "(0 bytes in 0.3 s: too slow|timed out); given up after"),
    "the whole file": (whole_file, r"the server answers the range \d+ to \d+ with the whole file"),
    "broken off": (broken_off, "peer closed connection .*; given up after 6 tries"),
    "no chunks": (no_chunks, "; given up after 6 tries"),
    "out of range": (status(416, Content_Range="bytes */1"), "HTTP 416"),
    "no content": (status(204), "HTTP 204"),
    "a loop": (to("{path}"), "too many redirects"),
    "this host's file": (to("file:///etc/passwd"), "unsupported protocol"),
    "no address": (to("http://[::1"), "(HTTP 302|nvalid)"),
    "years": (status(503, Retry_After="9" * 400), r"HTTP 503 .*the server asks to wait \d+ s: try again then"),
}


BY_CLIENT = list(WRONG)[
    : list(WRONG).index("broken off")
]  # the others S3's own client finds, and tries again by itself


@pytest.mark.parametrize(
    ("source", "case"),
    [*((source, case) for source in SOURCES for case in WRONG), *(("s3", case) for case in BY_CLIENT)],
)
def test_another_answer_than_the_range_is_not_taken(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, case: str
) -> None:
    answer, said = WRONG[case]
    if answer in (byte_by_byte, silent):
        monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.3)
        monkeypatch.setattr(limits, "DRIVER_SECONDS", 0.3)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fault = hostile(answer, lambda asked: asked.is_big)
    done = reshard("split", address(hub, source), tmp_path / "out", "--tp", 2, "--quiet")
    refused(done, said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("command", ["inspect", "check", "estimate", "split", "verify", "verify a set", "merge"])
def test_no_command_takes_another_range(hub: Hub, built: Path, tmp_path: Path, command: str, source: str) -> None:
    if command in ("verify a set", "merge"):
        hub.commits[COMMIT] = built / "right"
    place = address(hub, source)
    reads_all = command in ("split", "verify", "verify a set", "merge")
    hub.fault = hostile(
        other_total, lambda asked: asked.is_big if reads_all else asked.is_weights and asked.bounds[1] > 1
    )
    done = {
        "inspect": lambda: reshard("inspect", place),
        "check": lambda: reshard("check", place, "--tp", 2),
        "estimate": lambda: reshard("estimate", place, "--tp", 2),
        "split": lambda: reshard("split", place, tmp_path / "out", "--tp", 2),
        "verify": lambda: reshard("verify", built / "right", "--source", place),
        "verify a set": lambda: reshard("verify", place),
        "merge": lambda: reshard("merge", place, tmp_path / "out"),
    }[command]()
    refused(done, "the server answers with bytes ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", WITH_S3)
@pytest.mark.parametrize(("etag", "said"), [('"2"', 'it has ETag "2"'), (None, "it has no ETag")])
def test_another_state_of_the_file_is_not_taken(
    hub: Hub, tmp_path: Path, source: str, etag: str | None, said: str
) -> None:
    """A hub's ETag is its redirect's, where it redirects: here it serves the file itself."""

    def fault(handler: Handler, asked: Asked) -> bool:
        if not (asked.is_data or "/resolve/" in asked.path):
            return False
        first, stop = asked.bounds
        is_big = asked.file.endswith(".safetensors") and stop - first > 50_000
        with_etag(etag if is_big else 'W/"1"')(handler, asked)
        return True

    hub.fault = fault
    done = reshard("split", address(hub, source), tmp_path / "out", "--tp", 2, "--quiet")
    refused(done, rf'model-00001-of-00001.safetensors: has changed since it was first read \(it had ETag "1", {said}\)')
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_the_beginning_of_a_whole_file_is_that_range(hub: Hub, source: str) -> None:
    """As a server without ranges answers; no more of it is read."""
    hub.fault = hostile(whole_file, lambda asked: asked.is_data and asked.range is not None)
    assert reshard("inspect", address(hub, source)).code == 0
    hub.fault = hostile(another_whole_file, lambda asked: asked.is_weights and asked.bounds == (0, 8))
    refused(reshard("inspect", address(hub, source)), r"the answer has (\d+) bytes, expected \d+")


def test_a_password_does_not_follow_a_redirect_to_another_host(hub: Hub, built: Path, tmp_path: Path) -> None:
    def elsewhere(handler: Handler, asked: Asked) -> bool:
        if not asked.is_data or handler.headers["Host"].startswith("localhost"):
            return False
        handler.answer(302, headers={"Location": f"{hub.store}{asked.path}"})
        return True

    hub.fault = elsewhere
    place = hub.page.replace("://", "://user:a-password@")
    assert reshard("split", place, tmp_path / "out", "--tp", 2, "--quiet").code == 0
    same_but_for_the_origin({"kind": "remote", "name": COMMIT}, tmp_path / "out", built / "right")
    by_turns = [asked.authorization for asked in hub.asked if asked.is_data]
    assert by_turns.count(None) == len(by_turns) / 2
    assert {asked.authorization for asked in hub.asked} == {None, "Basic dXNlcjphLXBhc3N3b3Jk"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("part", ["listing", "data"])
def test_https_does_not_lead_to_http(hub: Hub, tmp_path: Path, source: str, part: str) -> None:
    """A server that is asked by TLS, and sends its client to `hub`, which is not."""
    certificate = make_certificate(tmp_path / "own.pem")

    def elsewhere(handler: Handler, asked: Asked) -> bool:
        meant = is_listing(asked) if part == "listing" else asked.is_data or "/resolve/" in asked.path
        if meant:
            handler.answer(302, headers={"Location": f"{hub.url}{handler.path}"})
        return meant

    with serving(Hub(hub.commits, fault=elsewhere), certificate) as safe:
        place = address(safe, source).replace("https://", "https://user:a-password@")
        environment = {"SSL_CERT_FILE": str(certificate), "HF_ENDPOINT": safe.url, "HF_HUB_OFFLINE": "0"}
        done = reshard_process("inspect", place, **environment)
    refused(done, f"{safe.url}/.*: redirects from https to {hub.url}/.*; nothing was asked for there")
    assert hub.asked == []


# --- listings ---


def described(hub: Hub, **changes: object) -> bytes:
    files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(hub.commits[COMMIT].iterdir())]
    return json.dumps({"id": REPO, "sha": COMMIT, "siblings": files, **changes}).encode()


def a_file(**changes: object) -> dict[str, object]:
    return {"siblings": [{"rfilename": "model.safetensors", "size": 8, **changes}]}


NAMES: dict[str, object] = {
    "parent": "..", "here": ".", "above": "../x.safetensors", "absolute": "/x.safetensors", "empty": "",
    "nothing between": "a//b", "backslash": "..\\x.safetensors", "line": "x\n::error::y", "escape": "x\x1b[31m",
    "zero": "x\0", "line separator": "x\u2028y", "half": "x\ud800", "long": "x" * 1_000_000, "none": None, "number": 5,
    "list": ["x"],
}  # fmt: skip
SIZES: dict[str, object] = {
    "text": "8", "fraction": 8.5, "negative": -5, "2^63": 2**63, "10^30": 10**30, "true": True, "list": [8],
    "none": None,
}  # fmt: skip
COMMITS: tuple[object, ...] = (5, None, ["a"], {"a": 1}, "../../x", "x\x1b]0;y\x07", COMMIT.upper() + "G", "main")
SIBLINGS: tuple[object, ...] = (None, "abc", {"a": 1}, [1, 2], [[]], 7)
BODIES: dict[str, bytes] = {
    "page": b"<html>", "list": b"[]", "empty": b"", "no text": b"\xff\xfe", "deep": b'{"a":' + b"[" * 100_000,
    "digits": b'{"id":' + b"9" * 5000 + b"}", "NaN": b'{"sha": NaN, "siblings": []}', "twice": b'{"sha": 1, "sha": 2}',
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "said"),
    [
        *((a_file(rfilename=name), "lists .*, which is no file's name|no character") for name in NAMES.values()),
        *((a_file(size=size), "its size is said to be .*, expected|does not say its size") for size in SIZES.values()),
        *(({"sha": commit}, "its commit is said to be .*, expected 40 hex digits") for commit in COMMITS),
        *(({"siblings": files}, "its files are said to be .*, expected a list of objects") for files in SIBLINGS),
        ({"siblings": 2 * [{"rfilename": "x", "size": 1}]}, "lists x twice"),
        *((body, "is HF_ENDPOINT a hub") for body in BODIES.values()),
    ],
)  # fmt: skip
def test_a_hub_s_description_is_checked_where_it_comes_in(hub: Hub, body: object, said: str) -> None:
    raw = body if isinstance(body, bytes) else described(hub, **body)  # type: ignore[arg-type]
    hub.fault = hostile(lambda handler, asked: handler.answer(200, raw), is_listing)
    refused(reshard("inspect", REPO), f"({said})")


@pytest.mark.parametrize(
    ("link", "said"),
    [
        *((name, "lists .*, which is no file's name") for name in ("%2e%2e", "%2e%2e%2fx", "%5c", "%0a", "%ff", "%1b")),
        ("x" * 300, "lists 'x.*, which is no file's name"),
    ],
)  # fmt: skip
def test_a_page_s_links_are_checked_where_they_come_in(hub: Hub, link: str, said: str) -> None:
    page = f'<a href="config.json">a</a> <A class=x href={link}>b</a>'.encode()
    hub.fault = hostile(
        lambda handler, asked: handler.answer(200, page), lambda asked: asked.path.endswith(f"{COMMIT}/")
    )
    refused(reshard("inspect", hub.page), said)


def test_links_to_other_places_are_no_files(hub: Hub, built: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (built / "model").iterdir())
    own = [f"<a href={name}>" for name in names[:1]] + [f"<a href='./{name}' >" for name in names[1:]]
    others = (
        "../", "/", "?C=N;O=D", "#top", "sub/", "sub/x.safetensors", "../x.safetensors", "javascript:x", "mailto:x",
        "http://other.invalid/blobs/x.safetensors", "http://[::1", f"/blobs/{COMMIT}/", names[0],
    )  # fmt: skip
    page = "".join([*own, *(f'<a href="{other}">x</a>' for other in others), '<a href="' * 1000]).encode()
    hub.fault = hostile(
        lambda handler, asked: handler.answer(200, page), lambda asked: asked.path.endswith(f"{COMMIT}/")
    )
    done = reshard("split", hub.page, tmp_path / "out", "--tp", 2, "--quiet")
    assert done.code == 0, done.err
    same_but_for_the_origin({"kind": "remote", "name": COMMIT}, tmp_path / "out", built / "right")


@pytest.mark.parametrize("source", SOURCES)
def test_too_many_files_are_told(hub: Hub, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(limits, "LISTING_FILES", 2)
    refused(reshard("inspect", address(hub, source)), "lists more than 2 files; give a checkpoint's own folder")
    assert hub.data_requests() == []


@pytest.mark.parametrize("entry", ["<Contents><Key>x{}</Key><Size>1</Size></Contents>", "<CommonPrefixes/>", ""])
def test_a_bucket_s_list_without_end_is_not_read_to_it(hub: Hub, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setattr(limits, "LISTING_FILES", 5)

    def page(handler: Handler, asked: Asked) -> None:
        entries = "".join(entry.format(number) for number in range(2 * len(hub.asked), 2 * len(hub.asked) + 2))
        more = "<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
        handler.answer(200, f"<ListBucketResult>{entries}{more}</ListBucketResult>".encode())

    hub.fault = hostile(page, lambda asked: True)
    refused(reshard("inspect", address(hub, "s3")), "lists more than 5 files; give a checkpoint's own folder")
    assert len(hub.asked) < 10


def test_links_that_lead_nowhere_are_counted_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a million of them apart is the work, not what is asked for afterwards."""
    monkeypatch.setattr(limits, "LISTING_FILES", 50)
    others = "".join(f'<a href="javascript:{number}">x</a>' for number in range(60)).encode()
    hub.fault = hostile(lambda handler, asked: handler.answer(200, others), is_listing)
    refused(reshard("inspect", hub.page), "lists more than 50 files; give a checkpoint's own folder")


def is_listing(asked: Asked) -> bool:
    return asked.path.startswith("/api/") or asked.path.endswith(f"/{COMMIT}/")


def page_without_end(handler: Handler, asked: Asked) -> None:
    handler.endless(200, {}, b" " * (1 << 20))


def page_byte_by_byte(handler: Handler, asked: Asked) -> None:
    handler.endless(200, {}, b" ", pause=0.05)


def page_compressed(handler: Handler, asked: Asked) -> None:
    handler.answer(200, gzip.compress(bytes(1 << 20)), {"Content-Encoding": "gzip"})


LISTINGS: dict[str, tuple[Answer, str]] = {
    "no end": (page_without_end, "the answer is longer than 16777216 bytes, the most that is read"),
    "byte by byte": (page_byte_by_byte, r"\d bytes in 0.3 s: too slow; given up after 3 tries"),
    "silence": (silent, "(0 bytes in 0.3 s: too slow|timed out); given up after"),
    "compressed": (page_compressed, "the answer is encoded as gzip, identity was asked for"),
    "a loop": (to("{path}"), "too many redirects"),
    "this host's file": (to("file:///etc/passwd"), "unsupported protocol"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", list(LISTINGS))
def test_a_listing_is_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch, case: str, source: str) -> None:
    answer, said = LISTINGS[case]
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fault = hostile(answer, is_listing)
    refused(reshard("inspect", address(hub, source)), said)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("part", ["listing", "data"])
def test_what_has_no_end_takes_no_memory(hub: Hub, source: str, part: str) -> None:
    if part == "listing":
        hub.fault = hostile(page_without_end, is_listing)
    else:
        hub.fault = hostile(without_end, lambda asked: asked.is_weights and asked.bounds == (0, 8))
    peak = r"re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]"
    told = f"lambda: print('warning: peak', {peak}, file=sys.stderr)"
    before = f"import atexit, re, sys; atexit.register({told})"
    done = reshard_process("inspect", address(hub, source), before=before, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
    refused(done, "the answer is longer than")
    (kib,) = re.findall(r"^warning: peak (\d+)$", done.err, re.MULTILINE)
    assert int(kib) >> 10 < PEAK_MIB
