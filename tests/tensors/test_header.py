"""Headers: the bytes we write, what safetensors' own reader makes of them, what we make of its files and of noise."""

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reshard.errors import HeaderError
from reshard.tensors.dtypes import BITS
from reshard.tensors.header import LENGTH_BYTES, Header, encode_header, header_length, parse_header

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
Entries = dict[str, tuple[str, tuple[int, ...]]]

GOLDEN = (
    b"\x8c\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]},'
    b'"\xc3\xa4":{"dtype":"BF16","shape":[],"data_offsets":[6,8]}}'
)


def read(raw: bytes) -> Header:
    """A whole file's header, as `read_header` takes it off a source."""
    length = header_length(raw[:LENGTH_BYTES], "f", len(raw))
    return parse_header(raw[: LENGTH_BYTES + length], "f", len(raw))


def contents(raw: bytes) -> Tensors:
    """Our reading of a file."""
    return {n: (i.dtype, i.shape, raw[i.start : i.stop]) for n, i in read(raw).tensors.items()}


def their_contents(raw: bytes) -> Tensors:
    """safetensors' reading of it."""
    found = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def file_of(text: bytes, data: bytes = b"") -> bytes:
    """A file with this header text."""
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


def placed(tensors: Tensors) -> tuple[Entries, bytes]:
    """Tensors one behind the other: what `encode_header` takes, and the data."""
    entries: Entries = {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        entries[name] = (dtype, shape)
        data += raw
    return entries, data


@st.composite
def _tensor(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    bits = prod(shape) * BITS[dtype]
    if bits % 8:
        shape, bits = (*shape, 4), bits * 4
    return dtype, shape, draw(st.binary(min_size=bits // 8, max_size=bits // 8))


_NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
_TENSORS = st.dictionaries(_NAMES, _tensor(), max_size=5)
_METADATA = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


@pytest.mark.parametrize(("align", "spaces"), [(1, 0), (8, 4), (64, 44), (256, 108), (4096, 3948)])
def test_golden_bytes(align: int, spaces: int) -> None:
    made = encode_header({"b": ("I8", (2, 3)), "ä": ("BF16", ())}, {"format": "pt"}, align)
    assert made == (140 + spaces).to_bytes(8, "little") + GOLDEN[8:] + b" " * spaces
    assert len(made) % align == 0


def test_golden_bytes_are_read() -> None:
    header = read(GOLDEN + bytes(8))
    assert list(header.tensors) == ["b", "ä"]
    assert [(t.dtype, t.shape, t.start, t.stop) for t in header.tensors.values()] == [
        ("I8", (2, 3), 148, 154),
        ("BF16", (), 154, 156),
    ]
    assert header.metadata == {"format": "pt"}
    assert (header.data_start, header.file_size) == (148, 156)
    assert header.digest == "02ea39a0ec783c5a04c6f911094dac21d9d09f17db6090c04c3e03ffdae3fcbc"


def test_entries_need_not_be_in_the_order_of_their_data() -> None:
    text = b'{"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert contents(file_of(text, b"xyz")) == {"b": ("U8", (2,), b"yz"), "a": ("U8", (1,), b"x")}


def test_no_tensors_and_no_metadata() -> None:
    header = read(file_of(b"{}"))
    assert (header.tensors, header.metadata) == ({}, {})


@settings(deadline=None)
@given(_TENSORS, _METADATA, st.sampled_from([1, 8, 64, 4096]))
def test_round_trip(tensors: Tensors, metadata: dict[str, str], align: int) -> None:
    entries, data = placed(tensors)
    made = encode_header(entries, metadata, align)
    raw = made + data
    header = read(raw)
    assert len(made) % align == 0
    assert header.data_start == len(made)
    assert header.metadata == metadata
    assert list(header.tensors) == list(tensors)
    assert contents(raw) == tensors


@pytest.mark.parametrize("text", ["loss -0.5", "[-0]", ":-0,", "\\ud800", '"', "\\", "\x7f\u2028", "\U0001f600"])
def test_text_that_looks_like_something_else(text: str) -> None:
    """What must not stand in JSON as a number or an escape may stand in a name and in metadata."""
    raw = encode_header({text: ("U8", (1,))}, {text: text}, 8) + b"x"
    assert contents(raw) == their_contents(raw) == {text: ("U8", (1,), b"x")}
    assert read(raw).metadata == {text: text}


@settings(deadline=None)
@given(_TENSORS, _METADATA)
def test_safetensors_reads_what_we_write(tensors: Tensors, metadata: dict[str, str]) -> None:
    entries, data = placed(tensors)
    assert their_contents(encode_header(entries, metadata, 64) + data) == tensors


def test_safe_open_reads_what_we_write(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "gate": np.arange(12, dtype=np.int8).reshape(3, 4),
        "scale": np.array([[0.5], [2.0]], np.float32),
        "bias": np.array([-7, 2**31 - 1], np.int32),
    }
    types = {"gate": "I8", "scale": "F32", "bias": "I32"}
    entries, data = placed({n: (types[n], a.shape, a.tobytes()) for n, a in arrays.items()})
    (tmp_path / "f").write_bytes(encode_header(entries, {"tp_rank": "3"}, 4096) + data)
    with safetensors.safe_open(tmp_path / "f", framework="np") as opened:
        assert opened.metadata() == {"tp_rank": "3"}
        assert sorted(opened.keys()) == sorted(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(opened.get_tensor(name), array)


_ARRAYS = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.sampled_from(["bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "i8", "u8", "f8", "c8"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 9),
)
_OUR_NAMES = {"b1": "BOOL", "c8": "C64"}


@settings(deadline=None)
@given(st.dictionaries(_NAMES, _ARRAYS, max_size=5), _METADATA)
def test_we_read_what_safetensors_writes(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    # Of no tensors with empty metadata, safetensors 0.8 writes a file that it cannot read itself.
    raw = safetensors.numpy.save(arrays, metadata or None)
    wanted = {}
    for name, array in arrays.items():
        kind = array.dtype.str[1:]
        dtype = _OUR_NAMES.get(kind, kind[0].upper() + str(8 * int(kind[1:])))
        wanted[name] = (dtype, array.shape, array.tobytes())
    assert contents(raw) == wanted
    assert read(raw).metadata == metadata


_VALID: Tensors = {
    "model.layers.0.mlp.gate_proj.weight": ("I8", (4, 2), bytes(range(8))),
    "model.layers.0.mlp.gate_proj.weight_scale": ("F32", (4, 1), bytes(range(16))),
    "empty": ("F4", (0, 3), b""),
    "one": ("BF16", (), b"ab"),
}
_VALID_FILE = encode_header(placed(_VALID)[0], {"format": "pt"}, 8) + placed(_VALID)[1]
_TOKENS = [
    b"0",
    b"1",
    b"-0",
    b"-1",
    b"1e1",
    b"8.0",
    b"99999999999999999999",
    b"null",
    b"true",
    b"NaN",
    b'"',
    b"\\ud800",
]
_TOKENS += [b"\\u0000", b"[", b"]", b"{", b"}", b",", b":", b" ", b"\n", b"\xff", b"\x00", b"I8", b"F4", b"F6_E2M3"]


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes replaced, taken out or put in; sometimes its claimed length is put right again."""
    raw = bytearray(_VALID_FILE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        width = draw(st.sampled_from([0, 1, 1, 2, 9]))
        raw[at : at + width] = draw(st.sampled_from(_TOKENS) | st.binary(max_size=3))
    if draw(st.booleans()):
        data = sum(len(data) for _, _, data in _VALID.values())
        raw[:LENGTH_BYTES] = max(0, len(raw) - LENGTH_BYTES - data).to_bytes(LENGTH_BYTES, "little")
    return bytes(raw)


def _with_shape(shape: str) -> bytes:
    return file_of(f'{{"a":{{"dtype":"I8","shape":{shape},"data_offsets":[0,0]}}}}'.encode())


@settings(max_examples=1500, deadline=None)
@given(_mutated() | st.binary(max_size=40))
# What Python's JSON lets through and safetensors' does not.
@example(_with_shape("[-0]"))
@example(_with_shape("[0, 18446744073709551616]"))
@example(_with_shape("[9223372036854775808, 4, 0]"))
@example(file_of(b'{"\\ud800":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'))
@example(file_of(b'{"__metadata__":{"a":"\\udfff"}}'))
@example(file_of(b'{"__metadata__":{"\\udfff":"a"}}'))
@example(file_of(b"\xef\xbb\xbf{}"))
@example(file_of(b"{}\x00"))
@example(file_of(b"[" * 100_000))
@example(file_of(b'{"a":' + b"9" * 5000 + b"}"))
def test_noise_is_refused_or_read_as_safetensors_does(raw: bytes) -> None:
    """Nothing but HeaderError comes out of a bad file; what we accept, safetensors accepts and reads alike."""
    ours: Tensors | None
    message = ""
    try:
        ours = contents(raw)
    except HeaderError as error:
        ours, message = None, str(error)
    if ours is None:
        assert message.startswith("f: ")
        assert message.isprintable()
    else:
        assert their_contents(raw) == ours


def test_mutations_reach_both_answers() -> None:
    """The test above would prove little if no mutated file were accepted."""
    assert contents(_VALID_FILE) == their_contents(_VALID_FILE) == _VALID
    other_type = _VALID_FILE.replace(b'"I8"', b'"U8"')
    assert contents(other_type)["model.layers.0.mlp.gate_proj.weight"][0] == "U8"


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_each_dtype_has_the_width_that_safetensors_gives_it(dtype: str) -> None:
    tensors: Tensors = {"a": (dtype, (8,), bytes(BITS[dtype]))}
    entries, data = placed(tensors)
    assert their_contents(encode_header(entries, {}, 1) + data) == tensors


@pytest.mark.parametrize(
    ("shape", "says"),
    [("[3]", "1.5 bytes"), ("[-1]", r"\[-1\]"), ("[true]", r"\[True\]"), ('"4"', "'4'"), ("[2]", "1 bytes")],
)
def test_four_bit_types_fill_whole_bytes(shape: str, says: str) -> None:
    text = f'{{"a":{{"dtype":"F4","shape":{shape},"data_offsets":[0,2]}}}}'.encode()
    with pytest.raises(HeaderError, match=says):
        read(file_of(text, b"ab"))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([1] * 33, "not a list of up to 32 numbers"),
        ([2**62] * 700_000 + [0], "not a list of up to 32 numbers"),
        ([2**62, 4, 0], "overflows 64 bits"),
        ([2**62, 2], "overflows 64 bits"),
    ],
    ids=["33", "700000", "zero", "overflow"],
)
def test_shapes_have_bounds(shape: list[int], says: str) -> None:
    text = json.dumps({"a": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(HeaderError, match=rf"^f: a: shape \[.*\] .*{says}"):
        read(file_of(text))


def test_names_have_bounds() -> None:
    entry = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    assert len(read(file_of(json.dumps({"a" * 500: entry}).encode())).tensors) == 1
    with pytest.raises(HeaderError, match=r"^f: 'aaa.*': a name of 501 characters, up to 500 are read; "):
        read(file_of(json.dumps({"a" * 501: entry}).encode()))


def test_long_shapes_do_not_flood_the_terminal() -> None:
    text = json.dumps({"a": {"dtype": "I8", "shape": [1] * 100_000, "data_offsets": [0, 2]}}).encode()
    with pytest.raises(HeaderError) as caught:
        read(file_of(text, b"ab"))
    assert len(str(caught.value)) < 2000


def test_a_header_ends_where_the_file_does() -> None:
    for beyond in (1, LENGTH_BYTES):
        raw = (20 + beyond).to_bytes(LENGTH_BYTES, "little") + b" " * 20
        with pytest.raises(
            HeaderError, match=f"the header claims {20 + beyond} bytes, the file has 20 after its first 8"
        ):
            header_length(raw, "f", len(raw))
    assert header_length((20).to_bytes(LENGTH_BYTES, "little"), "f", LENGTH_BYTES + 20) == 20
