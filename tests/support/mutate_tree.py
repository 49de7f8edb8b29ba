"""JSON as a tree where keys may be there twice and numbers be of any length."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Node = Any  # Members, a list, Token, str, int, float, bool, None
Path = tuple[int, ...]  # of positions, in Members too


class Members(list[list[Any]]):
    """An object: [key, value] pairs in their order, a key as often as one likes."""


@dataclass(frozen=True)
class Token:
    """Text that is written as it stands."""

    text: str


def parse(raw: bytes) -> Node:
    """A JSON text."""
    return json.loads(raw, object_pairs_hook=lambda pairs: Members([key, value] for key, value in pairs))


def encode(node: Node) -> bytes:
    """Its text: ASCII, but for what a Token holds."""
    return text(node).encode("utf-8", "surrogatepass")


def text(node: Node) -> str:
    """Its text."""
    if isinstance(node, Token):
        return node.text
    if isinstance(node, Members):
        return "{" + ", ".join(f"{text(key)}: {text(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(text, node)) + "]"
    return json.dumps(node)


def member(node: Node, key: str) -> Node:
    """The value of an object's key; None where it has none."""
    found = [value for name, value in node if name == key] if isinstance(node, Members) else []
    return found[-1] if found else None


def paths(root: Node) -> Iterator[Path]:
    """Every place below the root."""
    for index, child in enumerate(root):
        yield (index,)
        value = child[1] if isinstance(root, Members) else child
        if isinstance(value, list):
            yield from ((index, *path) for path in paths(value))


def get(root: Node, path: Path) -> Node:
    """The value at a place."""
    for index in path:
        root = root[index][1] if isinstance(root, Members) else root[index]
    return root


def put(root: Node, path: Path, value: Node) -> None:
    """Another value at a place."""
    holder = get(root, path[:-1])
    if isinstance(holder, Members):
        holder[path[-1]][1] = value
    else:
        holder[path[-1]] = value


def where(root: Node, path: Path) -> str:
    """A place in words."""
    words = []
    for depth, index in enumerate(path):
        holder = get(root, path[:depth])
        words.append(str(holder[index][0])[:60] if isinstance(holder, Members) else str(index))
    return ".".join(words)


def is_place(root: Node, path: Path) -> bool:
    """Whether there is a value."""
    for depth, index in enumerate(path):
        holder = get(root, path[:depth])
        if not isinstance(holder, list) or index >= len(holder):
            return False
    return True


def copy(node: Node) -> Node:
    """The same in objects and lists of its own."""
    if isinstance(node, Members):
        return Members([key, copy(value)] for key, value in node)
    return [copy(value) for value in node] if isinstance(node, list) else node
