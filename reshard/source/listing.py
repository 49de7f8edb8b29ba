"""What a server says is in a folder: checked where it comes in, for every kind of server."""

import re
import reprlib
from collections.abc import Iterable

from reshard import limits
from reshard.errors import SourceError

# Control characters (also of terminals that read C1), line ends, halves of characters; what separates folders.
_NO_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\\\]")


def listed(entries: Iterable[tuple[object, object]], place: str) -> dict[str, int]:
    """Name -> size in bytes of the files directly there, of paths from there and their sizes.

    Raises SourceError for what is no path or no size, for a path that comes twice, and for too many files.
    """
    found: dict[str, int] = {}
    for path, size in entries:
        parts = path.split("/") if isinstance(path, str) and len(path) <= limits.LISTING_BYTES else [""]
        if not all(map(_is_name, parts)):
            raise SourceError(f"{place}: lists {reprlib.repr(path)}, which is no file's name; rename it there")
        if len(parts) > 1:
            continue
        name = parts[0]
        if name in found:
            raise SourceError(f"{place}: lists {name} twice; is that the address of a folder?")
        if size is None:
            raise SourceError(f"{place}: {name}: the server does not say its size; copy the files here")
        if type(size) is not int or not 0 <= size <= limits.MAX_BYTES:
            raise SourceError(f"{place}: {name}: its size is said to be {reprlib.repr(size)}, expected bytes")
        found[name] = size
        if len(found) > limits.LISTING_FILES:
            raise too_many(place)
    return found


def too_many(place: str) -> SourceError:
    """More files than a checkpoint has, or links that may be such."""
    return SourceError(f"{place}: lists more than {limits.LISTING_FILES} files; give a checkpoint's own folder")


def _is_name(part: str) -> bool:
    """Whether it can name a file, or a folder, anywhere."""
    return part not in {"", ".", ".."} and not _NO_NAME.search(part) and len(part.encode()) <= limits.NAME_BYTES
