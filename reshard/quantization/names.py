"""How the tools match a module's name with an entry of a list, each as its library does.

An entry that begins with `re:` is a regular expression from the name's start, in every list.
"""

import fnmatch
import re
import reprlib
from collections.abc import Callable

from reshard import limits
from reshard.errors import SourceError
from reshard.model.naming import PREFIX, WRAPPED, parse_layer
from reshard.model.parts import DENSE_FFN
from reshard.quantization.patterns import PatternError, compiled
from reshard.quantization.section import Section

_NAME = re.compile(r"[\w.-]+")  # most entries are names: some lists have each module of a model

Match = Callable[[str, str], bool]
"""(entry, module's name) -> whether the entry means the module"""


def names_of(module: str) -> tuple[str, ...]:
    """A module's name, and in a wrapper its other ones: transformers 5 saves under other names than 4 did."""
    parsed = parse_layer(module)
    if parsed is None or parsed[0] in {PREFIX, ""}:
        return (module,)
    prefix = parsed[0]
    return tuple(dict.fromkeys((module, *(other + module.removeprefix(prefix) for other in (PREFIX, *WRAPPED)))))


def exact(entry: str, module: str) -> bool:
    """compressed-tensors' match_name and match_class."""
    return entry in {module, "Linear"}


def at_boundary(entry: str, module: str) -> bool:
    """As transformers' should_convert_module: a pattern from the start to a dot or the end, or the name's end."""
    if module.endswith(entry):
        return True
    if _NAME.fullmatch(entry) is None:
        return compiled(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")(module)
    at = 0
    for part in entry.split("."):  # a dot is any character
        if not module.startswith(part, at):
            return False
        at += len(part) + 1
    end = len(entry)
    return module[end - 1 : end] == "." or module[end : end + 1] in {"", "."}


def contained(entry: str, module: str) -> bool:
    """AutoAWQ: anywhere in the name."""
    return entry in module


def component(entry: str, module: str) -> bool:
    """bitsandbytes: a part of the name between dots, or as transformers matches."""
    return entry in module.split(".") or at_boundary(entry, module)


def wildcard(entry: str, module: str) -> bool:
    """ModelOpt and Quark: a pattern of the shell, or the module or what it stands in."""
    return fnmatch.fnmatchcase(module, entry) or module.startswith(entry + ".")


def pattern_only(entry: str, module: str) -> bool:
    """Entries with `re:` alone."""
    return False


def mentions(match: Match, entries: list[str], module: str, section: Section) -> bool:
    """Whether one of the entries means the module. Raises SourceError for an entry that is no pattern.

    An entry may name linears by what engines stack them in (vLLM's is_layer_skipped).
    """
    parent, _, role = module.rpartition(".")
    stack = DENSE_FFN.stack(role)
    names, stacked = names_of(module), names_of(f"{parent}.{stack}") if stack else ()
    for entry in section.timed(entries):
        try:
            if len(entry) > limits.PATTERN_CHARACTERS:
                raise PatternError(f"{len(entry)} characters, up to {limits.PATTERN_CHARACTERS} are read")
            if any(_means(match, entry, name) for name in (*names, *(stacked if stack and stack in entry else ()))):
                return True
        except (PatternError, re.error) as error:
            what = reprlib.repr(entry)
            raise SourceError(f"{section.file}: {section.path}: {what} is not a pattern: {error}") from error
    return False


def _means(match: Match, entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return compiled(entry[3:])(name)
    return match(entry, name)
