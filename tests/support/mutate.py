"""Mutations of JSON: on its tree, and on its text."""

import random
from collections.abc import Callable

from tests.support.mutate_tree import Members, Node, Path, copy, get, is_place, parse, paths, put, text, where
from tests.support.mutate_values import DEEP, HOSTILE, has_digit, nearby


def mutate(rng: random.Random, root: Node, keys: tuple[str, ...] = ()) -> str:
    """Change a tree in place, in one way. Returns what was done. keys: names that a reader may look for."""
    for _ in range(100):
        change = rng.choice(CHANGES)
        done = _insert(rng, root, keys) if change is _insert_any else change(rng, root)
        if done is not None:
            return done
    raise AssertionError("nothing to change")


def pick(rng: random.Random, root: Node, wanted: Callable[[Node], bool] = lambda value: True) -> Path | None:
    """A place whose value is wanted: half the time by going down from the root, so that long lists do not win."""
    if rng.random() < 0.5:
        for _ in range(20):
            path: Path = ()
            node = root
            while isinstance(node, list) and node and (not path or rng.random() < 0.85):
                path = (*path, rng.randrange(len(node)))
                node = get(root, path)
            if path and wanted(node):
                return path
    found = [path for path in paths(root) if wanted(get(root, path))]
    return rng.choice(found) if found else None


def _drop(rng: random.Random, root: Node) -> str | None:
    if (path := pick(rng, root)) is None:
        return None
    said = where(root, path)
    del get(root, path[:-1])[path[-1]]
    return f"drop {said}"


def _twice(rng: random.Random, root: Node) -> str | None:
    """A key or an element twice, the first or the last one perhaps of another value."""
    if (path := pick(rng, root)) is None:
        return None
    said, holder, other = where(root, path), get(root, path[:-1]), rng.random() < 0.5
    again = copy(holder[path[-1]])
    holder.insert(path[-1] + rng.randrange(2), again)
    if other:
        put(root, path, rng.choice(HOSTILE) if rng.random() < 0.5 else nearby(rng, get(root, path)))
    return f"{said} twice{', of two values' if other else ''}"


def _rename(rng: random.Random, root: Node) -> str | None:
    path = pick(rng, root)
    if path is None or not isinstance(holder := get(root, path[:-1]), Members):
        return None
    key = holder[path[-1]][0]
    others = [other for other, _ in holder if other != key]
    hostile = rng.choice([value for value in HOSTILE if isinstance(value, str)])
    holder[path[-1]][0] = rng.choice([key.upper(), key + " ", f"{key}_", hostile, *others[:1], *others[-1:]])
    return f"rename {key[:60]} to {holder[path[-1]][0][:60]!r}"


def _swap(rng: random.Random, root: Node) -> str | None:
    """Two values of one object or list exchanged, or two keys."""
    path = pick(rng, root, lambda value: isinstance(value, list) and len(value) > 1)
    path = path if path is not None and rng.random() < 0.9 else ()
    said, holder = where(root, path), get(root, path)
    if len(holder) < 2:
        return None
    one, other = rng.sample(range(len(holder)), 2)
    if isinstance(holder, Members):
        at = rng.randrange(2)
        holder[one][at], holder[other][at] = holder[other][at], holder[one][at]
        return f"{said}: {('keys', 'values')[at]} {one} and {other} exchanged"
    holder[one], holder[other] = holder[other], holder[one]
    return f"{said}: elements {one} and {other} exchanged"


def _exchange(rng: random.Random, root: Node) -> str | None:
    """What stands at one place below two elements of a list, exchanged or copied: ranks' slices, layers' schemes."""
    path = pick(rng, root)
    if path is None:
        return None
    depths = [
        depth
        for depth in range(len(path))
        if len(holder := get(root, path[:depth])) > 1 and (depth < len(path) - 1 or not isinstance(holder, Members))
    ]
    if not depths:
        return None
    depth = rng.choice(depths)
    index = rng.choice([i for i in range(len(get(root, path[:depth]))) if i != path[depth]])
    other = (*path[:depth], index, *path[depth + 1 :])
    if not is_place(root, other) or (mine := get(root, path)) == (theirs := get(root, other)):
        return None
    put(root, path, copy(theirs))
    if rng.random() < 0.3:
        return f"{where(root, other)} copied to {where(root, path)}"
    put(root, other, mine)
    return f"{where(root, path)} and {where(root, other)} exchanged"


def _digit(rng: random.Random, root: Node) -> str | None:
    """One digit of a number, or of a name that has one."""
    path = pick(rng, root, lambda v: not isinstance(v, bool) and isinstance(v, int | float | str) and has_digit(v))
    if path is None:
        return None
    before = get(root, path)
    after = nearby(rng, before)
    put(root, path, after)
    return f"{where(root, path)}: {str(before)[:80]} -> {str(after)[:80]}"


def _hostile(rng: random.Random, root: Node) -> str | None:
    if (path := pick(rng, root)) is None:
        return None
    value = rng.choice(HOSTILE)
    put(root, path, copy(value))
    return f"{where(root, path)} = {repr(value)[:60]}"


def _type(rng: random.Random, root: Node) -> str | None:
    """The same in another type."""
    if (path := pick(rng, root)) is None:
        return None
    value = get(root, path)
    others: list[Node] = [[value], Members([["value", value]]), text(value)[:100_000], None]
    if isinstance(value, list):
        others += [len(value), value[0] if value else None]
    elif isinstance(value, int | float):
        others += [float(value) if abs(value) < 2**60 else 0.5, bool(value), -value]
    put(root, path, rng.choice(others))
    return f"{where(root, path)} as {repr(get(root, path))[:60]}"


def _insert_any(rng: random.Random, root: Node) -> str | None:
    return _insert(rng, root, ())


def _insert(rng: random.Random, root: Node, keys: tuple[str, ...]) -> str | None:
    """A key that was not there, with any value; one that is read, perhaps."""
    path = pick(rng, root, lambda value: isinstance(value, Members))
    path = path if path is not None and rng.random() < 0.4 else ()
    said, holder = where(root, path), get(root, path)
    if not isinstance(holder, Members):
        return None
    key = rng.choice((*keys, *keys, "unknown", "__proto__"))
    others = [copy(get(root, other)) for other in rng.sample(list(paths(root)), min(2, len(list(paths(root)))))]
    value = rng.choice([rng.choice(HOSTILE), [rng.choice(HOSTILE)], rng.randrange(4), *others])
    holder.insert(rng.randrange(len(holder) + 1), [key, copy(value)])
    return f"{said}: a key {key} of {repr(value)[:60]}"


def _order(rng: random.Random, root: Node) -> str | None:
    path = pick(rng, root, lambda value: isinstance(value, list) and len(value) > 1)
    if path is None:
        return None
    rng.shuffle(get(root, path))
    return f"{where(root, path)} in another order"


_EXCHANGED = (("layers.0", "layers.1"), ("gate_proj", "up_proj"), ("gate_proj", "down_proj"), ("00000-of", "00001-of"))


def _names(rng: random.Random, root: Node) -> str | None:
    """Two parts of names exchanged, in all strings below a place."""
    path = pick(rng, root, lambda value: isinstance(value, list)) if rng.random() < 0.6 else None
    one, other = rng.choice(_EXCHANGED)
    below = root if path is None else get(root, path)
    raw = text(below)
    if one not in raw and other not in raw:
        return None
    try:
        changed = parse(raw.replace(one, "\x7f").replace(other, one).replace("\x7f", other).encode("utf-8", "replace"))
    except (ValueError, RecursionError):  # what an earlier mutation put there
        return None
    if path is None:
        root[:] = changed
    else:
        put(root, path, changed)
    return f"{one} and {other} exchanged below {where(root, path or ()) or 'the root'}"


CHANGES: tuple[Callable[[random.Random, Node], str | None], ...] = (
    _drop,
    _twice,
    _rename,
    _swap,
    _exchange,
    _exchange,
    _digit,
    _digit,
    _digit,
    _hostile,
    _hostile,
    _type,
    _insert_any,
    _order,
    _names,
)


def mutate_text(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """A JSON text that is none any more, or is one in a form that few expect."""
    at = rng.randrange(len(raw) + 1)
    changes: dict[str, Callable[[], bytes]] = {
        "cut short": lambda: raw[:at],
        "empty": lambda: b"",
        "only spaces": lambda: b" " * 10,
        "twice": lambda: raw + raw,
        "something behind it": lambda: raw + b"\n]",
        "a byte order mark": lambda: b"\xef\xbb\xbf" + raw,
        "UTF-16": lambda: raw.decode("utf-8", "replace").encode("utf-16"),
        "bytes that are not UTF-8": lambda: raw[:at] + b"\xff\xfe\xed\xa0\x80" + raw[at:],
        "a control character": lambda: raw[:at] + b"\x1b[2J\x00" + raw[at:],
        "brackets without end": lambda: raw[:at] + b"[" * DEEP,
        "a list around it": lambda: b"[" + raw + b"]",
        "a number": lambda: b"7",
        "a string": lambda: b'"' + b"x" * 1_000_000 + b'"',
        "many spaces behind it": lambda: raw + b" " * 20_000_000,
        "zeros behind it": lambda: raw + bytes(4096),
    }
    said = rng.choice(sorted(changes))
    return changes[said](), f"{said} (at {at})"
