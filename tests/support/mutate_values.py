"""Values that have nothing to do where they are put, and those that are nearly right."""

import random
import string

from tests.support.mutate_tree import Members, Node, Token, copy

DEEP = 200_000
HOSTILE: tuple[Node, ...] = (
    "",
    "\x1b[31mred\x1b]0;title\x07",
    "line\r\n::error::forged\n",
    "\x00",
    "\ud800",
    "\u202egnp.exe",
    "\x9b2J",
    "[bold]x[/bold][/]",
    "../../etc/passwd",
    "/dev/zero",
    "nul\\con",
    "a" * 300,
    "b" * 1_000_000,
    "re:(a+)+$",
    "re:(.*a){30}",
    "re:(?=",
    "re:" + "(" * 2000 + ")" * 2000,
    "https://user:secret@host/x?token=secret",
    "９",
    "1e3",
    "silu",
    "config.json",
    "manifest.json",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.99999999999999999999.mlp.down_proj.weight",
    "model-00001-of-00001.safetensors",
    "denseffn-rank-00000-of-00002.safetensors",
    0,
    -1,
    1,
    2**31,
    2**62,
    2**63,
    2**64,
    10**30,
    1.5,
    128.0,
    1e308,
    Token("1e400"),
    Token("-0"),
    Token("NaN"),
    Token("-Infinity"),
    Token("9" * 5_000),
    Token("1" + "0" * 200_000),
    Token("1." + "0" * 5_000),
    Token("[" * DEEP + "]" * DEEP),
    Token('{"a":' * DEEP + "1" + "}" * DEEP),
    Token("[" * 500 + "]" * 500),
    None,
    True,
    False,
    [],
    Members(),
    [None],
    [[]],
    Members([["", None]]),
)


def has_digit(value: Node) -> bool:
    """Whether `nearby` can change a digit of it."""
    return any(digit in str(value)[:200] for digit in string.digits)


def nearby(rng: random.Random, value: Node) -> Node:
    """A value that differs by one digit, or by one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int) and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value])
    if isinstance(value, int | str):
        text = str(value)
        places = [i for i, character in enumerate(text) if character in string.digits]
        if not places:
            return text[:-1] if text else "x"
        at = rng.choice(places)
        changed = text[:at] + rng.choice([d for d in string.digits if d != text[at]]) + text[at + 1 :]
        return changed if isinstance(value, str) else int(changed)
    if isinstance(value, float):
        return value + 1
    return copy(value)
