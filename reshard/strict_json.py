"""The one reader of JSON that others wrote: files beside weights, headers, manifests, what servers answer.

What standard readers disagree about is refused (keys twice, NaN, half characters), and so is what would take a
machine's time or memory: bytes, values, depth and digits are bounded, most of them before anything is parsed.
"""

import json
import re
import reprlib
from math import isfinite
from typing import Any

from reshard import limits
from reshard.errors import ReshardError, SourceError
from reshard.source.recognise import PREFIX_BYTES, recognised

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive: linear, also where the end is missing
_ALIKE = bytes.maketrans(b"123456789", b"000000000")
_TOO_MANY_DIGITS = b"0" * (limits.JSON_NUMBER + 1)
_MINUS_ZERO = re.compile(r"-0(?<=[\[,:\s]-0)(?![.eE])")


def check_size(size: int, file: str, error: type[ReshardError] = SourceError, most: int = limits.JSON_BYTES) -> None:
    """Before a JSON file is read. Raises `error`."""
    if size > most:
        raise error(f"{file}: {size} bytes, up to {most} are read; put the file of this checkpoint there")


def parse_json(
    raw: bytes,
    file: str,
    error: type[ReshardError] = SourceError,
    *,
    most: int = limits.JSON_BYTES,
    values: int = limits.JSON_VALUES,
    finite: bool = True,
) -> Any:
    """A JSON text of at most `most` bytes and so many values. A byte order mark in front of it is passed over.

    finite: numbers are; else Infinity and NaN are numbers too, as Python's own reader and writer have it. Raises
    `error`, one line that begins with `file`.
    """
    check_size(len(raw), file, error, most)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise error(_known(raw, file) or f"{file}: not UTF-8 (byte {wrong.start}); copy or download it again") from None
    brackets = raw.translate(None, _NOT_BRACKETS)
    if raw.count(b",") + len(brackets) // 2 > values:
        raise error(f"{file}: holds more than {values:,} values; put the file of this checkpoint there")
    deep = _is_deep(brackets) and _is_deep(_STRING.sub(b"", raw).translate(None, _NOT_BRACKETS))
    odd = _TOO_MANY_DIGITS in raw.translate(_ALIKE) or _MINUS_ZERO.search(text) is not None
    try:
        value = json.JSONDecoder(
            object_pairs_hook=_unique,
            parse_float=_finite if finite else _float,
            parse_int=_integer if odd else None,
            parse_constant=_finite if finite else None,
        ).decode(text)
    except json.JSONDecodeError as wrong:
        mend = "mend it there" if wrong.pos < len(text.rstrip()) else "copy or download it again"
        raise error(_known(raw, file) or f"{file}: not valid JSON: {wrong}; {mend}") from None
    except _RefusedError as wrong:
        line = f"line {text.count(chr(10), 0, text.find(wrong.literal)) + 1}: " if wrong.literal else ""
        raise error(_known(raw, file) or f"{file}: {line}{wrong}") from None
    except RecursionError:
        deep = True
    if deep:
        raise error(f"{file}: nested deeper than {limits.JSON_DEPTH} levels; copy or download it again")
    if "\\u" in text and not _is_text(value):
        raise error(f"{file}: holds an escape that is no character; copy or download it again")
    return value


def parse_object(raw: bytes, file: str) -> dict[str, Any]:
    """A file beside weights, which must hold one object, and not one that a server answers errors with.

    transformers writes Infinity into config.json (Mamba's `time_step_limit`). Raises SourceError.
    """
    value = parse_json(raw, file, finite=False)
    if what := _known(raw, file):
        raise SourceError(what)
    if not isinstance(value, dict):
        raise SourceError(
            f"{file}: holds a {type(value).__name__}, expected a JSON object; put the file of this checkpoint there"
        )
    levels: list[Any] = [value]
    while levels:
        for key in (key for level in levels if isinstance(level, dict) for key in level):
            if len(key) > limits.NAME_CHARACTERS:
                raise SourceError(
                    f"{file}: a key of {len(key)} characters ({reprlib.repr(key)}), up to {limits.NAME_CHARACTERS} are "
                    "read"
                )
        inner = (one for level in levels for one in (level.values() if isinstance(level, dict) else level))
        levels = [one for one in inner if isinstance(one, dict | list)]
    return value


class _RefusedError(Exception):
    """What JSON readers accept and this one does not. literal: how it is written, where that tells its place."""

    def __init__(self, message: str, literal: str = "") -> None:
        super().__init__(message)
        self.literal = literal


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"duplicate key {reprlib.repr(key)}; keep one of the two, or write the file again")
            seen.add(key)
    return found


def _integer(text: str) -> int:
    if text == "-0":
        raise _RefusedError("holds -0, which some readers take for no whole number; write 0")
    return int(_bounded(text))


def _float(text: str) -> float:
    return float(_bounded(text))


def _finite(text: str) -> float:
    value = _float(text)
    if not isfinite(value):
        raise _RefusedError(f"holds {text}, which is no finite number; write one", text)
    return value


def _bounded(text: str) -> str:
    if len(text) > limits.JSON_NUMBER:
        raise _RefusedError(
            f"the number {reprlib.repr(text)} has {len(text)} characters, up to {limits.JSON_NUMBER} are read", text
        )
    return text


def _is_deep(brackets: bytes) -> bool:
    """Whether nesting is deeper than allowed, or not balanced: each turn takes the innermost pairs out."""
    for _ in range(limits.JSON_DEPTH):
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == before:
            break
    return bool(brackets)


def _is_text(value: Any) -> bool:
    """Whether all strings are: an escape can spell half of a character, which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _known(raw: bytes, file: str) -> str | None:
    return recognised(raw[:PREFIX_BYTES], file, len(raw))
