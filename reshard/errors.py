"""What can go wrong, and the exit code each ends with.

ReshardError                    1   something the user can mend; one line, no traceback
├── SourceError                 1   a source cannot be read, or contradicts itself
│   ├── HeaderError             1   a safetensors header that must not be trusted
│   ├── LayersError             1   dense layers that are not there, or not those that config.json names
│   └── ShapesError             1   weights of other shapes than config.json's sizes make
├── SchemeError                 1   a tensor, type or layout that the table of schemes does not know
├── AlignmentError              1   a cut that the sizes do not allow
├── ManifestError               1   a manifest that is missing, malformed or of an unknown version
├── ProfileError                1   a device profile that is missing or makes no sense
├── OutputError                 1   the output folder cannot be used
│   ├── SpaceError              1   too little room
│   └── BusyError               1   another run is writing there
├── MissingDependencyError      1   an optional package is needed for this and is not installed
├── ShardError                  1   a shard that is not what its manifest says, or not this rank's
├── GroupError                  1   a group that does not fit its shards, or whose ranks disagree
├── TokensError                 1   tokens, or counts of them, that a layer cannot take
├── HostError                   1   the host refuses: a path, memory
├── UnforeseenError             1   an exception that nothing expects: worth a report
├── UsageError                  2   options that contradict each other
└── MismatchError               3   a check found a difference
"""

import os
import shlex

from reshard.safe_text import safe_line


class ReshardError(Exception):
    """Base of all errors that a user can cause; `exit_code` is what the command line ends with.

    The message is one line that may be shown anywhere, whatever names and secrets it was made of.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(safe_line(message))


class SourceError(ReshardError):
    """A source cannot be read, or contradicts itself."""


class HeaderError(SourceError):
    """A safetensors header that must not be trusted."""


class LayersError(SourceError):
    """Dense layers that are not there, or not those that config.json names."""


class ShapesError(SourceError):
    """Weights of other shapes than config.json's sizes make."""


class SchemeError(ReshardError):
    """A tensor, quantization type or layout that the table of schemes does not know."""


class AlignmentError(ReshardError):
    """A cut that the sizes do not allow."""


class ManifestError(ReshardError):
    """A manifest that is missing, malformed or of an unknown version."""


class ProfileError(ReshardError):
    """A device profile that is missing or makes no sense."""


class OutputError(ReshardError):
    """The output folder cannot be used."""


class SpaceError(OutputError):
    """Too little room in the output folder."""


class BusyError(OutputError):
    """Another run is writing into the output folder."""


class MissingDependencyError(ReshardError):
    """An optional package is needed and is not installed.

    what: needs it. package: as pip knows it. why: of its import's failure. way_out: another one than to install it.
    """

    def __init__(self, what: str, package: str, why: object = "not installed", way_out: str = "") -> None:
        super().__init__(
            f"{what} needs {package}, which cannot be imported ({why}): pip install {shlex.quote(package)}{way_out}"
        )


class ShardError(ReshardError):
    """A shard that is not what its manifest says, or not this rank's."""


class GroupError(ReshardError):
    """A group that does not fit its shards, or whose ranks disagree."""


class TokensError(ReshardError):
    """Tokens, or counts of them, that a layer cannot take."""


class HostError(ReshardError):
    """The host refuses: a path, memory."""


class UnforeseenError(ReshardError):
    """An exception that nothing expects: worth a report."""


class UsageError(ReshardError):
    """Options that contradict each other."""

    exit_code = 2


class MismatchError(ReshardError):
    """A check found a difference."""

    exit_code = 3


def as_reshard_error(error: BaseException) -> ReshardError:
    """Any exception as one whose message is a line for people; the exception itself is its cause."""
    if isinstance(error, ReshardError):
        return error
    found: ReshardError
    if isinstance(error, OSError) and error.strerror:
        paths = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        found = HostError(f"{' -> '.join(paths) or type(error).__name__}: {error.strerror}; see to it and start again")
    elif isinstance(error, MemoryError):
        found = HostError(f"not enough memory ({str(error) or 'no more is given'}); free some, or use another host")
    else:
        text = " ".join(str(error).split())
        found = UnforeseenError(
            f"unforeseen: {type(error).__name__}{text and ': '}{text}; run again with --debug, and report what it shows"
        )
    found.__cause__ = error
    return found
