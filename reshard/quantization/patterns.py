"""Regular expressions that others wrote, matched in bounded time; Python's own may take years for 60 characters.

All places in the text that a part of a pattern can reach are followed at once, as the bits of a number: bit i stands
before the i-th character. A loop goes on from each place once, so that a match takes at most (parts of the pattern) *
(nesting of loops) * (characters) operations on such numbers. A condition that looks ahead or behind is the places where
it holds. What cannot be followed so is refused: references to groups, atomic groups, possessive loops.
"""

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from reshard import limits
from reshard.errors import SchemeError

try:  # private, and the same since Python 3.11; a test says whether they are what is read here
    from re import _constants as op  # type: ignore[attr-defined]
    from re import _parser as syntax  # type: ignore[attr-defined]
except ImportError as error:
    raise SchemeError(
        f"Python {platform.python_version()} takes regular expressions apart in another way than is known here "
        f"({error}); run reshard with Python 3.11 to 3.13"
    ) from error

_READ = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}


_CHARACTERS = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)


class PatternError(ValueError):
    """What is no regular expression, or none that is followed."""


class _Text:
    """What is matched. reached: where each loop has been; holds: where each condition does."""

    def __init__(self, text: str) -> None:
        self.end = 1 << len(text)
        self.everywhere = 2 * self.end - 1
        self.line_end = self.end >> 1 if text.endswith("\n") else 0
        self.characters: dict[str, int] = {}
        for at, character in enumerate(text):
            self.characters[character] = self.characters.get(character, 0) | 1 << at
        self.reached: dict[Any, int] = {}
        self.holds: dict[Any, int] = {}


_Step = Callable[[_Text, int, bool], int]
"""(text, places, forward) -> the places behind a part of the pattern where it begins at these; or, not forward, those
before it where it ends at these."""


@lru_cache(128)  # each is asked for each linear
def compiled(source: str) -> Callable[[str], bool]:
    """Whether a text begins with the regular expression, as Python's `re.match` has it. Raises PatternError."""
    try:
        parsed = syntax.parse(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(str(error)) from error
    step = _Builder().sequence(parsed, parsed.state.flags)
    return lambda text: step(_Text(text), 1, True) != 0


class _Builder:
    """Steps from Python's parse of a pattern: pairs of a code and its value."""

    def __init__(self) -> None:
        self._parts = self._depth = 0

    def sequence(self, items: Iterable[tuple[Any, Any]], flags: int) -> _Step:
        """One part behind the other."""
        if flags & ~_READ:
            raise PatternError(f"{re.RegexFlag(flags & ~_READ)!r} is not read")
        self._depth += 1
        if self._depth > limits.PATTERN_DEPTH:
            raise PatternError(f"nested deeper than {limits.PATTERN_DEPTH} levels")
        steps = [self._step(code, value, flags) for code, value in items]
        self._depth -= 1
        return _all_of(steps)

    def _step(self, code: Any, value: Any, flags: int) -> _Step:
        self._count()
        if code in _CHARACTERS:
            return _character(_before(code, value, flags))
        if code is op.SUBPATTERN:
            _, added, removed, inner = value
            return self.sequence(inner, (flags | added) & ~removed)
        if code is op.BRANCH:
            return _any_of([self.sequence(inner, flags) for inner in value[1]])
        if code is op.MAX_REPEAT or code is op.MIN_REPEAT:
            return self._repeat(value, flags)
        if code is op.AT:
            return _place(value)
        if code is op.ASSERT or code is op.ASSERT_NOT:
            return _condition(self.sequence(value[1], flags), value[0] > 0, code is op.ASSERT)
        if code is op.FAILURE:
            return _any_of([])
        raise PatternError(f"{str(code).lower()} is not read")

    def _repeat(self, value: tuple[int, Any, Any], flags: int) -> _Step:
        least, most, inner = value

        def again() -> _Step:
            self._count()
            return self.sequence(inner, flags)

        steps = [again() for _ in range(least)]
        if most is op.MAXREPEAT:
            ((code, inside),) = inner if len(inner) == 1 else ((None, None),)
            endless = _run(_before(code, inside, flags)) if code in _CHARACTERS else _loop(again())
            return _all_of([*steps, endless])
        return _all_of([*steps, *(_any_of([again(), _all_of([])]) for _ in range(most - least))])

    def _count(self) -> None:
        self._parts += 1
        if self._parts > limits.PATTERN_PARTS:
            raise PatternError(f"more than {limits.PATTERN_PARTS} parts (a{{3}} has as many as aaa)")


def _before(code: Any, value: Any, flags: int) -> Callable[[_Text], int]:
    """The places before a character that the pattern's one is."""
    items = value if code is op.IN else [(op.LITERAL, ord("\n") if code is op.ANY else value)]
    if code is op.ANY and flags & re.DOTALL:
        return lambda text: text.everywhere ^ text.end
    wanted = code is op.LITERAL or (code is op.IN and items[0][0] is not op.NEGATE)
    tests = [_test(code, value) for code, value in items if code is not op.NEGATE]
    ignore_case = bool(flags & re.IGNORECASE)

    def fits(character: str) -> bool:
        cases = {character, character.lower()[:1], character.upper()[:1]} if ignore_case else {character}
        return any(test(case) for test in tests for case in cases) == wanted

    if ignore_case or [code for code, _ in items] != [op.LITERAL]:
        return lambda text: sum(before for character, before in text.characters.items() if fits(character))
    only = chr(items[0][1])
    if wanted:
        return lambda text: text.characters.get(only, 0)
    return lambda text: text.everywhere ^ text.end ^ text.characters.get(only, 0)


def _character(before: Callable[[_Text], int]) -> _Step:
    def step(text: _Text, places: int, forward: bool) -> int:
        there = before(text)
        return (places & there) << 1 if forward else places >> 1 & there

    return step


def _test(code: Any, value: Any) -> Callable[[str], bool]:
    if code is op.LITERAL:
        return chr(value).__eq__
    if code is op.RANGE:
        return lambda character: bool(value[0] <= ord(character) <= value[1])
    return _CATEGORIES[value]


def _all_of(steps: Sequence[_Step]) -> _Step:
    """One behind the other."""
    backwards = steps[::-1]

    def step(text: _Text, places: int, forward: bool) -> int:
        for one in steps if forward else backwards:
            if places:
                places = one(text, places, forward)
        return places

    return step


def _any_of(steps: Sequence[_Step]) -> _Step:
    def step(text: _Text, places: int, forward: bool) -> int:
        found = 0
        for one in steps:
            found |= one(text, places, forward)
        return found

    return step


def _loop(inner: _Step) -> _Step:
    """As often as one likes, or never. Where it has been before, it has gone on from."""
    own = object()  # a step that named itself would be freed by the garbage collector alone

    def step(text: _Text, places: int, forward: bool) -> int:
        reached, before = 0, text.reached.get(own, 0)
        while places := places & ~(before | reached):
            reached |= places
            places = inner(text, places, forward)
        text.reached[own] = before | reached
        return reached

    return step


def _run(before: Callable[[_Text], int]) -> _Step:
    """A loop over one character: a carry runs over the characters that follow one another."""
    back = _loop(_character(before))

    def step(text: _Text, places: int, forward: bool) -> int:
        if not forward:
            return back(text, places, forward)
        there = before(text)
        return (places & there) + there ^ there | places

    return step


def _condition(inner: _Step, ahead: bool, wanted: bool) -> _Step:
    """What must, or must not, follow or precede."""
    own = object()

    def step(text: _Text, places: int, forward: bool) -> int:
        if own not in text.holds:
            text.holds[own] = inner(text, text.everywhere, not ahead)
        return places & (text.holds[own] if wanted else ~text.holds[own])

    return step


def _place(code: Any) -> _Step:
    """A place by itself: the start, the end, between a word and what is none."""
    if code not in _PLACES:
        raise PatternError(f"{str(code).lower()} is not read")
    return lambda text, places, forward: places & _PLACES[code](text)


def _boundaries(text: _Text) -> int:
    words = sum(before for character, before in text.characters.items() if _is_word(character))
    return words ^ words << 1


_PLACES: dict[Any, Callable[[_Text], int]] = {
    op.AT_BEGINNING: lambda text: 1,
    op.AT_BEGINNING_STRING: lambda text: 1,
    op.AT_END: lambda text: text.end | text.line_end,
    op.AT_END_STRING: lambda text: text.end,
    op.AT_BOUNDARY: _boundaries,
    op.AT_NON_BOUNDARY: lambda text: text.everywhere & ~_boundaries(text),
}
