"""The digest of itself that a manifest or a record holds, made again after a change, whatever its bytes are."""

import json
import re

from blake3 import blake3

_ZEROS = b"0" * 64
_LAST = re.compile(rb'"blake3": ?"([0-9a-f]{64})"\s*\}\s*\Z')


def reseal(raw: bytes) -> bytes:
    """The file with the digest that fits it; what holds none at its top stays as it is."""
    said = _said(raw)
    if said is None:
        return raw
    empty = raw.replace(said, _ZEROS, 1)
    return empty.replace(_ZEROS, blake3(empty).hexdigest().encode(), 1)


def _said(raw: bytes) -> bytes | None:
    try:
        value = json.loads(raw)
        said = value.get("blake3") if isinstance(value, dict) else None
        return said.encode() if isinstance(said, str) and len(said) == len(_ZEROS) else None
    except (ValueError, RecursionError):
        match = _LAST.search(raw)
        return match[1] if match else None
