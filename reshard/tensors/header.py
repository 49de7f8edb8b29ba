"""The safetensors header: 8 bytes little-endian length, that many bytes of JSON, then the tensors' bytes.

Read strictly: what the format forbids is refused here, so that no later step computes with a number that does not
hold. https://github.com/huggingface/safetensors#format
"""

import json
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from reshard import limits
from reshard.errors import HeaderError
from reshard.source.recognise import PREFIX_BYTES, recognised
from reshard.strict_json import parse_json
from reshard.tensors.dtypes import BITS, nbytes

LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; `start` and `stop` are offsets from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's tensors. `digest` is the BLAKE3 of the length and the JSON, as hex."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    digest: str
    data_start: int
    file_size: int


ReadBytes = Callable[[int, int], bytes]
"""Bytes [start, stop) of a file."""


def read_header(read: ReadBytes, file: str, file_size: int, beside: Collection[str] = ()) -> Header:
    """A file's header. Raises HeaderError if it must not be trusted. beside: the names of the other files there."""
    try:
        return parse_header(read_raw_header(read, file, file_size), file, file_size)
    except HeaderError as error:
        what = recognised(read(0, min(file_size, PREFIX_BYTES)), file, file_size, beside)
        if what is None:
            raise
        raise HeaderError(what) from error


def read_raw_header(read: ReadBytes, file: str, file_size: int) -> bytes:
    """The file's first 8 + length bytes. Raises HeaderError if the file cannot hold them."""
    return read(0, LENGTH_BYTES + header_length(read(0, min(file_size, LENGTH_BYTES)), file, file_size))


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """Length of the JSON, from the file's first 8 bytes. Raises HeaderError if the file cannot hold it."""
    if file_size == 0:
        raise _refusal(file, "the file is empty")
    if file_size < LENGTH_BYTES:
        raise _refusal(file, f"{file_size} bytes, a safetensors file has at least {LENGTH_BYTES}")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > limits.HEADER_BYTES:
        raise HeaderError(
            f"{file}: the header claims {length} bytes, the format allows {limits.HEADER_BYTES}; is it a safetensors "
            "file?"
        )
    if LENGTH_BYTES + length > file_size:
        raise _refusal(
            file, f"the header claims {length} bytes, the file has {file_size - LENGTH_BYTES} after its first 8"
        )
    return length


def parse_header(raw: bytes, file: str, file_size: int) -> Header:
    """The header in `raw`, the file's first 8 + length bytes. Raises HeaderError for whatever the format forbids."""
    entries = _entries(raw[LENGTH_BYTES:], file)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal(file, "__metadata__ is not a map of strings to strings")
    data_start = len(raw)
    tensors = {name: _tensor(entry, name, file, data_start) for name, entry in entries.items()}
    _check_layout(tensors, file, data_start, file_size)
    return Header(tensors, metadata, blake3(raw).hexdigest(), data_start, file_size)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], align: int) -> bytes:
    """Header bytes for tensors (dtype, shape) whose data follow one another in that order.

    Padded with spaces so that the data begins on a multiple of `align`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % align)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _entries(text: bytes, file: str) -> dict[str, Any]:
    entries = parse_json(text, f"{file}: header", HeaderError, most=limits.HEADER_BYTES)
    if not isinstance(entries, dict) or not text.startswith(b"{"):
        raise _refusal(file, "the header is not a JSON object")
    return entries


def _tensor(entry: Any, name: str, file: str, data_start: int) -> TensorInfo:
    if len(name) > limits.NAME_CHARACTERS:
        raise _refusal(
            file, f"{_short(name)}: a name of {len(name)} characters, up to {limits.NAME_CHARACTERS} are read"
        )
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        got = _short(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise _refusal(file, f"{name}: the entry has {got}, expected dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise HeaderError(f"{file}: {name}: unknown dtype {_short(dtype)}; known are {', '.join(BITS)}")
    if not _naturals(shape) or len(shape) > limits.DIMENSIONS:
        raise _refusal(file, f"{name}: shape {_short(shape)} is not a list of up to {limits.DIMENSIONS} numbers from 0")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _refusal(file, f"{name}: data_offsets {_short(offsets)} is not two numbers from 0")
    start, stop = offsets
    total = 1
    for factor in (*shape, bits):
        total *= factor
        if total > limits.MAX_BYTES:  # also where a 0 follows, as safetensors has it
            raise _refusal(file, f"{name}: shape {_short(shape)} of {dtype} overflows 64 bits")
    if total % 8 or total // 8 != stop - start:
        size = total // 8 if total % 8 == 0 else total / 8
        raise _refusal(
            file, f"{name}: shape {_short(shape)} of {dtype} is {size} bytes, the offsets {offsets} hold {stop - start}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= limits.MAX_BYTES for value in values)


def _check_layout(tensors: Mapping[str, TensorInfo], file: str, data_start: int, file_size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    at, before = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            kind = "overlap" if info.start < at else "leave a hole"
            raise _refusal(
                file,
                f"{name}: data begins at {info.start - data_start}, {before} ends at {at - data_start}: the tensors "
                f"{kind}",
            )
        at, before = info.stop, name
    if at > file_size:
        raise _refusal(
            file, f"the tensors, {before} the last, need {at} bytes, the file has {file_size}: it is cut short"
        )
    if at < file_size:
        raise HeaderError(
            f"{file}: {file_size - at} bytes after the last tensor ({before}) belong to none; was it joined from "
            "parts, or written over a larger file? Copy it again"
        )


def _refusal(file: str, what: str) -> HeaderError:
    return HeaderError(f"{file}: {what}; copy or download the file again")


def _short(value: Any) -> str:
    """A value of the file's as text that does not flood a terminal."""
    return reprlib.repr(value)
