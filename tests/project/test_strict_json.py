"""JSON that others wrote: what is read, and the line that refuses each thing that is not."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard import limits
from reshard.errors import HeaderError, SourceError
from reshard.strict_json import parse_json, parse_object

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
BRACKETS = '"[[{' + "[" * limits.JSON_DEPTH


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@given(_VALUES, st.sampled_from([None, 1]), st.booleans())
def test_reads_what_python_writes(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse_json(text.encode(), "f") == parse_json(b"\xef\xbb\xbf" + text.encode(), "f") == value


@pytest.mark.parametrize(
    "text",
    [
        nested(limits.JSON_DEPTH),
        json.dumps({BRACKETS: [BRACKETS]}),  # brackets in strings are no levels
        "[-0.0, -0e1, 10, [-1]]",
        json.dumps({"model.layers.0-0": " -0", "x": ":-0,", "digits": "9" * 1000}),
        "1" * limits.JSON_NUMBER,
        '"\\ud83d\\ude00"',
    ],
)
def test_what_looks_like_something_else_is_read(text: str) -> None:
    assert parse_json(text.encode(), "f") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (nested(limits.JSON_DEPTH + 1), "nested deeper than 64 levels"),
        (nested(100_000), "nested deeper than 64 levels"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ('{"a":' * 100_000, "nested deeper than 64 levels"),
        ("[" * 900, "not valid JSON: Expecting value: line 1 column 901"),
        (f'{{"{BRACKETS[1:]}": {nested(65)}}}', "nested deeper than 64 levels"),
        ('{"a": 1,\n "b": {"c": 1, "c": 1}}', "duplicate key 'c'; keep one of the two"),
        ('{"a": 1, "\\u0061": 2}', "duplicate key 'a'"),
        (
            '[\n"x", ' + "9" * 5000 + "]",
            "line 2: the number '999999999999...9999999999999' has 5000 characters, up to 300",
        ),
        ("[0." + "1" * 5000 + "]", "line 1: the number '0.1"),
        ("[1,\n-1e999]", "line 2: holds -1e999, which is no finite number"),
        ("[NaN]", "line 1: holds NaN, which is no finite number"),
        ("[-Infinity]", "holds -Infinity"),
        ('{"a": -0}', "holds -0"),
        ('["\\ud800"]', "an escape that is no character"),
        ('{"\\udfff": 1}', "an escape that is no character"),
        ("[1, 2", "not valid JSON: Expecting ',' delimiter: line 1 column 6 (char 5); copy or download it again"),
        ("[1 2, 3]", "(char 3); mend it there"),
        ("[" + "1," * 750_000 + "1]", "holds more than 750,000 values"),
        ("", "not valid JSON"),
    ],
)
def test_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(HeaderError) as caught:
        parse_json(text.encode(), "a/file", HeaderError)
    assert str(caught.value).startswith("a/file: ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_bytes_are_bounded_and_are_text() -> None:
    with pytest.raises(SourceError, match=r"^f: 11 bytes, up to 10 are read; "):
        parse_json(b"[" + b" " * 9 + b"]", "f", most=10)
    with pytest.raises(SourceError, match=r"^f: not UTF-8 \(byte 2\)"):
        parse_json(b'["\xff"]', "f")


def test_an_object_of_a_checkpoint() -> None:
    """transformers writes Infinity into config.json of models with a state space."""
    assert parse_object(b'{"time_step_limit": [0.0, Infinity, 1e999]}', "config.json") == {
        "time_step_limit": [0.0, float("inf"), float("inf")]
    }
    with pytest.raises(SourceError, match=r"config\.json: holds a list, expected a JSON object"):
        parse_object(b"[]", "config.json")
    with pytest.raises(SourceError, match=r"^config\.json: a key of 501 characters \('aaa"):
        parse_object(b'{"a": [{"b": [[], {"' + b"a" * 501 + b'": 1}]}]}', "config.json")
    with pytest.raises(SourceError, match=r"config\.json: an answer of a server"):
        parse_object(b'{"error": "no such file"}', "config.json")


@pytest.mark.slow
def test_what_stays_within_the_bounds_takes_no_more_than_half_a_gigabyte() -> None:
    """An object of as many keys as may be, each with a text: what takes the most memory of all."""
    code = """
import re
from reshard import limits
from reshard.strict_json import parse_json
raw = b"{" + b",".join(b'"%x":"%x"' % (i, i) for i in range(limits.JSON_VALUES - 10)) + b"}"
assert len(parse_json(raw.ljust(limits.JSON_BYTES), "f")) == limits.JSON_VALUES - 10
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) >> 10 < 500
