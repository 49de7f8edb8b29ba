"""A hub, and a plain folder on a server, whose answers are wrong: listings, heads, statuses, bodies."""

import functools
import gzip
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support import mutate
from tests.support.hub_server import COMMIT, Asked, Fault, Handler, Hub, serving
from tests.support.mutate_files import mutate_bytes
from tests.support.mutate_tree import Members, encode, member, parse
from tests.support.mutate_values import nearby

WEB = "/files/"
HUB = {"description": 5, "redirect": 2, "data": 3}
PLAIN = {"page": 3, "data": 4}
_KEYS = ("sha", "siblings", "rfilename", "size", "lfs", "id", "gated", "private", "error", "disabled", "createdAt")
_ENDLESS_BYTES = 300_000_000  # what is called endless here: nobody may read so much of it


@dataclass(frozen=True)
class Answer:
    """What goes over the connection. repeat: how often the body is sent after its announced length."""

    status: bytes
    head: tuple[tuple[str, str], ...]
    body: bytes
    repeat: int = 0
    hang_up: bool = False

    def with_head(self, name: str, value: str | None) -> "Answer":
        """The same with another header; None leaves it out."""
        kept = tuple(pair for pair in self.head if pair[0].lower() != name.lower())
        return replace(self, head=kept if value is None else (*kept, (name, value)))

    def head_of(self, name: str) -> str:
        """A header's value."""
        return next((value for key, value in self.head if key.lower() == name.lower()), "")


Change = Callable[[random.Random, Answer], Answer]


def _described(rng: random.Random, answer: Answer) -> Answer:
    if not answer.body:
        return _status(rng, answer)
    tree = parse(answer.body)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if isinstance(tree, list) and tree:
            mutate.mutate(rng, tree, _KEYS)
    return _of_length(replace(answer, body=encode(tree)))


def _text(rng: random.Random, answer: Answer) -> Answer:
    return _of_length(replace(answer, body=mutate.mutate_text(rng, answer.body)[0]))


def _listed(rng: random.Random, answer: Answer) -> Answer:
    """Files that are not there, of any size and name."""
    if not answer.body:
        return _status(rng, answer)
    tree = parse(answer.body)
    siblings = member(tree, "siblings")
    for _ in range(rng.choice([1, 3, 50_000])):
        name = rng.choice(
            ["model-00009-of-00009.safetensors", "config.json", "a/../../x", "", "\x1b[2J.json", "a" * 5000]
        )
        siblings.append(Members([["rfilename", name], ["size", rng.choice([0, -1, 7, 2**62, 2**70, "7", None])]]))
    return _of_length(replace(answer, body=encode(tree)))


_PAGE_BYTES = 20_000_000


def _page(rng: random.Random, answer: Answer) -> Answer:
    """Links to what is not there, or is elsewhere; so many that nobody reads them all."""
    links = ["a/b", "../x", "//host/x", "javascript:x", "", "%00", "%2e%2e%2fx", "\x1b[2J", "a" * 5000, "x.safetensors"]
    link = f'<a href="{rng.choice(links)}">x</a>'.encode()
    return _of_length(replace(answer, body=answer.body + link * rng.choice([1, 3, _PAGE_BYTES // len(link)])))


def _of_length(answer: Answer) -> Answer:
    return answer.with_head("Content-Length", str(len(answer.body)))


_STATUSES = (
    *(b"200 OK", b"204 No Content", b"206 Partial", b"301 Moved", b"302 Found", b"304 Not Modified", b"400 Bad"),
    *(b"401 No", b"403 No", b"404 No", b"416 Range", b"418 T", b"429 Slow down", b"500 Sorry", b"503 Busy"),
    *(b"999 \x1b[31mred", b"200", b"abc", b"-1 x", b"200 " + b"x" * 100_000),
)


def _status(rng: random.Random, answer: Answer) -> Answer:
    changed = replace(answer, status=rng.choice(_STATUSES))
    if rng.random() < 0.5:
        wait = rng.choice(
            ["", "soon", "-5", "1e9", "9" * 400, "9" * 5000, "٣", "Wed, 99 Foo 9999 99:99:99 GMT", "NaN", "0"]
        )
        changed = changed.with_head(rng.choice(["Retry-After", "RateLimit"]), wait)
    if rng.random() < 0.3:
        changed = changed.with_head("X-Error-Message", rng.choice(["\x1b[31mred", "::error::x", "m" * 60_000, "ü\x85"]))
        code = rng.choice(["GatedRepo", "RepoNotFound", "EntryNotFound", "\x1b[1m", "RevisionNotFound"])
        changed = changed.with_head("X-Error-Code", code)
    return changed


_HEADERS = (
    *("Content-Length", "Content-Range", "Content-Encoding", "Content-Type", "ETag", "Location", "X-Repo-Commit"),
    *("X-Linked-Size", "X-Linked-Etag", "Transfer-Encoding", "Link", "X-Xet-Hash", "Set-Cookie", "Connection"),
)
_VALUES = (
    *("", "0", "-1", "7", "9" * 5000, "gzip", "br", "deflate", "bytes 0-1/2", "bytes */7", "bytes 0-9/*", "chunked"),
    *("\x1b[31m", "x" * 70_000, "file:///etc/passwd", "http://", "http://[::1", "//nowhere", "/", "1" * 40, "é\x85"),
    *("http://user:secret@localhost:1/x", "gopher://x/", "close", "text/html", '"other"'),
)


def _header(rng: random.Random, answer: Answer) -> Answer:
    name = rng.choice([key for key, _ in answer.head]) if rng.random() < 0.6 else rng.choice(_HEADERS)
    value = rng.choice([None, *_VALUES])
    if rng.random() < 0.4 and (old := answer.head_of(name)):
        value = nearby(rng, old)
    return answer.with_head(name, value)


def _many(rng: random.Random, answer: Answer) -> Answer:
    return replace(answer, head=(*answer.head, *((f"X-{i}", "x" * 100) for i in range(rng.choice([99, 20_000])))))


def _other_range(rng: random.Random, answer: Answer) -> Answer:
    """Another range, and it says so; or the right one with bytes more or less."""
    said = answer.head_of("Content-Range")
    if rng.random() < 0.5 and said.startswith("bytes "):
        first, _, rest = said.removeprefix("bytes ").partition("-")
        last, _, size = rest.partition("/")
        by = rng.choice([-2, -1, 1, 2, 4096])
        return answer.with_head("Content-Range", f"bytes {int(first) + by}-{int(last) + by}/{size}")
    body = rng.choice([answer.body[:-1], answer.body[1:], answer.body + b"\0", b"", answer.body * 2])
    return _of_length(replace(answer, body=body)) if rng.random() < 0.5 else replace(answer, body=body, hang_up=True)


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(1, wbits=31)  # gzip's form
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(_ENDLESS_BYTES >> 20)) + packer.flush()


def _packed(rng: random.Random, answer: Answer) -> Answer:
    """A body that is small on the way and large here."""
    body = _bomb() if rng.random() < 0.5 else gzip.compress(answer.body, 1)
    return _of_length(replace(answer, body=body)).with_head("Content-Encoding", "gzip")


def _endless(rng: random.Random, answer: Answer) -> Answer:
    chunk = answer.body or b"x"
    chunk *= max(1, 65_536 // len(chunk))
    changed = replace(answer, body=chunk, repeat=_ENDLESS_BYTES // len(chunk), hang_up=True)
    return changed.with_head("Content-Length", rng.choice([None, str(2**62)]))


def _bytes(rng: random.Random, answer: Answer) -> Answer:
    if not answer.body:
        return _status(rng, answer)
    return replace(answer, body=mutate_bytes(rng, answer.body)[0], hang_up=True)


_OF_ALL: tuple[Change, ...] = (_status, _status, _header, _header, _many, _endless, _packed)
_CHANGES: dict[str, tuple[Change, ...]] = {
    "description": (_described, _described, _described, _described, _text, _listed, _bytes, *_OF_ALL),
    "redirect": (_header, _header, *_OF_ALL),
    "page": (_page, _page, _bytes, *_OF_ALL),
    "data": (_other_range, _other_range, _other_range, *_OF_ALL),
}


def _which(asked: Asked) -> str:
    if asked.is_data or asked.path.startswith(WEB):
        return "page" if asked.path == WEB else "data"
    return "description" if asked.path.startswith("/api/") else "redirect"


def fault(rng: random.Random, kinds: Mapping[str, int]) -> tuple[Fault, str]:
    """One kind of answer spoilt in one way, always or the n-th time. kinds: of HUB or PLAIN."""
    which = rng.choices(list(kinds), list(kinds.values()))[0]
    change = rng.choice(_CHANGES[which])
    time, seed = rng.choice([None, None, 0, 1, 2]), rng.randrange(1 << 30)
    seen = 0

    def spoil(handler: Handler, asked: Asked) -> bool:
        nonlocal seen
        handler.__dict__.pop("answer", None)
        if _which(asked) == which:
            if time is None or seen == time:
                handler.answer = lambda *a, **k: _send(handler, change(random.Random(seed), _answer(*a, **k)))  # type: ignore[method-assign]
            seen += 1
        return as_web(handler, asked)

    often = "every time" if time is None else f"time {time}"
    return spoil, f"{which} {change.__name__.strip('_')}, {often}, seed {seed}"


def as_web(handler: Handler, asked: Asked) -> bool:
    """What a plain server has below WEB: a page of links, and the files with their ranges."""
    if not asked.path.startswith(WEB):
        return False
    (folder,) = handler.hub.commits.values()
    if asked.path == WEB:
        links = "".join(f'<li><a href="{path.name}">{path.name}</a></li>' for path in sorted(folder.iterdir()))
        handler.answer(200, f"<html><ul>{links}</ul></html>".encode(), {"Content-Type": "text/html"})
    elif (path := folder / asked.file).is_file():
        handler.send_range(path.read_bytes(), asked.range)
    else:
        handler.answer(404)
    return True


def _answer(status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None) -> Answer:
    head = {"Content-Length": str(len(body)), **(headers or {})}
    return Answer(f"{status} Status".encode(), tuple(head.items()), body)


def _send(handler: Handler, answer: Answer) -> None:
    lines = [b"HTTP/1.1 " + answer.status]
    lines += [f"{name}: {value}".encode("utf-8", "surrogateescape") for name, value in answer.head]
    try:
        handler.wfile.write(b"\r\n".join(lines) + b"\r\n\r\n")
        if handler.command != "HEAD":
            handler.wfile.write(answer.body)
            for _ in range(answer.repeat):
                handler.wfile.write(answer.body)
    except OSError:
        handler.close_connection = True  # the client has gone
    handler.close_connection = handler.close_connection or answer.hang_up or not answer.head_of("Content-Length")


@contextmanager
def serving_files(source: Path, spoil: Fault) -> Iterator[str]:
    """The source's files as a repository of the hub that this process asks; the address of the plain folder."""
    from reshard.source import hub as asked

    found = asked.find_repository
    with serving(Hub({COMMIT: source}, fault=spoil)) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "find_repository", functools.partial(found, endpoint=hub.url))
        yield f"{hub.url}{WEB}"
