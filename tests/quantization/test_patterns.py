"""Regular expressions of a config: Python's answers, in a time that is bounded."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reshard import limits
from reshard.errors import SourceError
from reshard.quantization.names import at_boundary, exact, mentions, wildcard
from reshard.quantization.patterns import PatternError, compiled
from reshard.quantization.section import Section
from tests.support.builders import Spec, build
from tests.support.running import reshard_process

_ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\W", "[a-c_]", "^", "$", r"\b", r"\B", r"\Z", r"[^\s1]", "é"]
_TIMES = ["", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"]
_OPENS = ["(", "(?:", "(?=", "(?!", "(?i:", "(?s:", "(?P<name>"]


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeated = st.tuples(st.sampled_from(["(", "(?:", "(?i:"]), inner, st.sampled_from(_TIMES)).map(
        lambda parts: f"{parts[0]}{parts[1]}){parts[2]}"
    )
    looking = st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda parts: f"{parts[0]}{parts[1]})")
    either = st.lists(inner, min_size=2, max_size=3).map("|".join)
    return repeated | looking | either | st.lists(inner, max_size=4).map("".join)


_REPEATED = st.tuples(st.sampled_from(_ATOMS), st.sampled_from(_TIMES)).map("".join)
_BEHIND = st.sampled_from([r"(?<=a)", r"(?<!\.)", r"(?<=ab|ba)", "(?<![ab]c)"])
_PATTERNS = st.recursive(_REPEATED | _BEHIND, _larger, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(_PATTERNS, st.text("abAB.c_1 é\n", min_size=1, max_size=12))
@example(r"(?:a.b)(?:(?<=\.)|(?=\.|$))", "acb.c")
@example("(?:(?:a*)b?)*c", "aabbac")
@example("(?i:[^a]b)", "AB")
@example("$", "\n")
@example("a(?!b*$)", "abb")
@example("(?s).b", "\nb")
@example(r"(?x) a  b # ab", "ab")
def test_answers_are_those_of_python(pattern: str, text: str) -> None:
    try:
        wanted = re.match(pattern, text) is not None
    except re.error:
        with pytest.raises(PatternError):
            compiled(pattern)
        return
    assert compiled(pattern)(text) is wanted


PARSED = """
[(LITERAL, 97), (MAX_REPEAT, (0, MAXREPEAT, [(IN, [(NEGATE, None), (RANGE, (98, 99)), (CATEGORY, CATEGORY_DIGIT)])])),
 (MIN_REPEAT, (1, MAXREPEAT, [(SUBPATTERN, (None, 2, 0, [(BRANCH, (None, [[(LITERAL, 120)], [(LITERAL, 121),
 (LITERAL, 122)]]))]))])), (ASSERT, (1, [(ANY, None)])), (ASSERT_NOT, (-1, [(AT, AT_BEGINNING)])), (NOT_LITERAL, 100),
 (AT, AT_END), (AT, AT_BOUNDARY)]
"""


def test_python_takes_patterns_apart_as_the_matcher_has_it() -> None:
    """Its parser is private: another Python may change it."""
    parsed = re._parser.parse(r"a[^b-c\d]*(?i:x|yz)+?(?=.)(?<!^)[^d]$\b")  # type: ignore[attr-defined]
    assert repr(parsed) == " ".join(PARSED.split()), (
        f"Python {sys.version}: re._parser gives something else than reshard/quantization/patterns.py reads"
    )


def test_a_python_without_that_parser_is_told(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    before = """
import builtins
real = builtins.__import__
def another(name, globals=None, locals=None, names=(), level=0):
    if name == "re" and "_parser" in (names or ()):
        raise ImportError("no _parser")
    return real(name, globals, locals, names, level)
builtins.__import__ = another
"""
    done = reshard_process("inspect", tmp_path / "model", before=before)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: Python 3.")
    assert "in another way than is known here (no _parser); run reshard with Python 3.11 to" in done.err
    assert done.err.count("\n") == 1


NAME = "model.layers.10.mlp.gate_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z._0-9]*)*)*!",
        "(a|a)*" + "(x+x+)+" * 30 + "y",
        "(.*)*" * 100 + "!",
        "((((.*a)*b)*c)*d)*!",
        ".*" * 400 + "!",
        "(?:a|.)*(?!.*!)(?=(?:.*.*)*!)",
        "(?:" * 20 + ".*" + ")*" * 20 + "!",
        "(.{0,20}){0,20}!",
    ],
)
@pytest.mark.parametrize("text", [NAME, "a" * limits.NAME_CHARACTERS])
def test_what_python_does_not_end(pattern: str, text: str) -> None:
    assert compiled(pattern)(text) is False


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", r"missing \)"),
        ("a{99999999999}", "repetition number is too large"),
        ("a{9999999}", "more than 2000 parts"),
        ("(){0,999999}", "more than 2000 parts"),
        ("((((((a{9}){9}){9}){9}){9}){9}){9}", "more than 2000 parts"),
        (r"(a)\1", "groupref is not read"),
        ("(?>a)b", "atomic_group is not read"),
        ("a*+b", "possessive_repeat is not read"),
        ("(?m)^a", "re.MULTILINE is not read"),
        ("(?m:a)", "re.MULTILINE is not read"),
        ("(" * 60 + ")" * 60, "nested deeper than 50 levels"),
        ("(" * 500 + ")" * 500, "nested deeper|recursion"),
    ],
)
def test_what_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        compiled(pattern)


@pytest.mark.parametrize("entry", ["a" * 501, "re:" + "a" * 501, "*" * 501])
def test_long_entries_are_refused(entry: str) -> None:
    section = Section("config.json", "quantization_config", {})
    with pytest.raises(
        SourceError, match=r"^config\.json: quantization_config: .* is not a pattern: 50. characters, up to 500"
    ):
        mentions(wildcard, [entry], NAME, section)


def test_lists_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what one section lists, all that is compared counts: a group's targets, too."""
    section = Section("config.json", "quantization_config", {})
    assert not mentions(exact, ["x"] * 1000, NAME, section.below("config_groups.group_0", {}))
    monkeypatch.setattr(limits, "MATCHING_SECONDS", section.spent[0])
    with pytest.raises(SourceError, match=r"^config\.json: quantization_config: its lists .* take longer than 0\.0"):
        mentions(exact, ["x"] * 1000, NAME, section)


@settings(deadline=None)
@given(st.text("ab.-", min_size=1, max_size=6), st.text("ab.-", min_size=1, max_size=8))
@example("a.", "a")
@example("a..", "ab")
def test_names_are_matched_as_the_patterns_they_are(entry: str, module: str) -> None:
    """In transformers' lists a name is a pattern whose dots are any character."""
    at_its_start = re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)
    assert at_boundary(entry, module) is (module.endswith(entry) or at_its_start is not None)
