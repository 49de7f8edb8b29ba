"""Text that may leave the program: without secrets, one printable line, of bounded length.

Names in checkpoints, what servers answer and what libraries say of it are other people's text. It leaves through
ReshardError and the command line's output, which both call `safe_line`: nothing else needs to.
"""

import json
import os
import re
from functools import lru_cache
from urllib.parse import quote

from reshard.limits import LINE_CHARACTERS

_TAIL = 1000  # of them at its end, where messages say the way out
_HIDDEN = "***"
_SHORTEST = 6  # characters of what is known to be a secret: shorter ones are ordinary words, too
_ALONE = 12  # a shorter one is hidden only where it stands as a word of its own

_ADDRESS = re.compile(r"://([^\s'\"<>]+)")
_BARE = re.compile(r"(?<![\w/.:@])[\w.+-]+:(?!/)[^\s'\"<>@:]+@(?=[\w.-])")  # user:password@host, the protocol forgotten
_QUERY = re.compile(r"[?#][\w.%-]{1,200}=[^\s'\"<>)]*")
_VALUE = re.compile(
    r"((?:token|secret|passw(?:or)?d|signature|credentials?|(?:access|api|account|secret)[_-]?key(?:[_-]?id)?)=)"
    r"['\"]?[^\s'\"&;,)]+"
    r"|\b((?:Bearer|Basic) )[\w.+/=~-]{6,}",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"[?&#]([^&=\s]+)=([^&#\s]+)")
_SECRET_VARIABLES = ("TOKEN", "SECRET", "PASSWORD", "ACCESS_KEY", "ACCESS_KEY_ID", "API_KEY", "ACCOUNT_KEY", "SAS")

_kept: set[str] = set()


def safe_line(text: object) -> str:
    """A text as one line that may be shown."""
    whole = str(text)
    # Cut before the work, which is much for a name of 10 MB, and so wide that no half of a secret is left.
    near = (
        whole
        if len(whole) <= 4 * LINE_CHARACTERS
        else f"{whole[: 2 * LINE_CHARACTERS]} … {whole[-2 * LINE_CHARACTERS :]}"
    )
    line = redacted(printable(near))
    if len(line) <= LINE_CHARACTERS:
        return line
    told = f" … ({len(whole):,} characters) … "
    return line[: LINE_CHARACTERS - _TAIL - len(told)] + told + line[-_TAIL:]


def printable(text: str) -> str:
    """What terminals and CI logs show as it is: what cannot be printed, or begins a command, is spelt out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if line.lstrip().startswith("::"):  # GitHub's commands begin a line
        line = line.replace(":", r"\x3a", 1)
    return line.replace("##", r"#\x23")  # its older ones, Azure's and TeamCity's may stand anywhere in it


def redacted(text: str) -> str:
    """A text without users, passwords and queries of addresses, and without values that are known to be secret."""
    text = _BARE.sub(f"{_HIDDEN}@", _ADDRESS.sub(_without_user, text))
    return without_secrets(_VALUE.sub(rf"\1\2{_HIDDEN}", _QUERY.sub("", text)))


def without_secrets(text: str) -> str:
    """A text with the values that are known to be secret hidden."""
    known = _kept.union(*map(_of_variable, os.environ.items()))
    return _pattern(frozenset(known)).sub(_HIDDEN, text) if known else text


def keep_secret(address: str) -> None:
    """From now on hide an address's password and tokens, also where a library's text has only parts of it."""
    _kept.update(_of_address(address))


def one_line(error: object) -> str:
    """What a library says went wrong, its lines as one; some say nothing."""
    return " ".join(str(error).split())


def _without_user(match: re.Match[str]) -> str:
    """Several addresses may follow on one another, as in zip://FILE::https://HOST."""
    return "".join(f"://{part.partition('?')[0][len(_user(part)) :]}" for part in match[1].split("://"))


def _user(address: str) -> str:
    """What precedes the host, up to its @: user:password@.

    With a colon in front up to the last @, for passwords have slashes. In hf://ORG/NAME@REVISION there is none.
    """
    head = address.partition("?")[0]
    host = head.partition("/")[0]
    user, at, _ = (head if ":" in host else host).rpartition("@")
    return user + at


def _of_variable(variable: tuple[str, str]) -> frozenset[str]:
    name, value = variable
    if name.upper().endswith(_SECRET_VARIABLES) and len(value) >= _SHORTEST:
        return frozenset({value})
    return _of_address(value) if "://" in value and len(value.split()) == 1 else frozenset()


@lru_cache(maxsize=256)
def _of_address(text: str) -> frozenset[str]:
    """The secrets in an address, whole and in the parts that a library's message may name."""
    found = {value for name, value in _PARAMETER.findall(text) if _VALUE.match(f"{name.rpartition('-')[2]}=x")}
    protocol, *parts = text.split("://")
    for part in parts:
        user, colon, password = _user(part).removesuffix("@").partition(":")
        if protocol.endswith("github"):  # org:repo@, where a token may follow the repo
            password = password.partition(":")[2]
        found |= {password, *re.split("[/@:]", password)} if colon else {user}
        found |= {f"{user}:{piece}" for piece in re.split("[/@]", password) if piece}
        protocol = part
    return frozenset(word for word in found if len(word) >= _SHORTEST)


@lru_cache(maxsize=16)
def _pattern(known: frozenset[str]) -> re.Pattern[str]:
    """Any of them as it is, and as addresses, JSON, Python and `printable` spell it; the longest first."""
    spelt = {
        form
        for word in known
        for form in (word, quote(word), quote(word, ""), json.dumps(word)[1:-1], repr(word)[1:-1], printable(word))
    }
    words = sorted(spelt, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(_bounded, words)))


def _bounded(word: str) -> str:
    return re.escape(word) if len(word) >= _ALONE else rf"(?<!\w){re.escape(word)}(?!\w)"
