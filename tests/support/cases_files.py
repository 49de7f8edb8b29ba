"""Bad files: headers that must not be trusted, indexes and folders that do not hold what they say."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.errors import HeaderError
from tests.support.corrupt import (
    AGAIN,
    EMBED,
    FIRST,
    GATE,
    INDEX,
    SECOND,
    UP,
    Case,
    both,
    config,
    edited_json,
    entry,
    header,
    header_text,
    mapped,
    removed,
    resized,
    shifted,
    written,
)

UP_WEIGHT, GATE_WEIGHT = f"{UP}.weight", f"{GATE}.weight"
LAST = "model.layers.3.mlp.gate.weight"  # the first file's last tensor
NOT_HERE = "beside"  # put the file beside the index


def _as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def _named(tensor: str) -> Any:
    return lambda entries: entries.update({tensor: entries.pop(UP_WEIGHT) | {"dtype": "F7"}})


def _moved(tensor: str, by: int) -> Any:
    def change(entries: dict[str, Any]) -> None:
        found = entries[tensor]
        found["data_offsets"] = [offset + by for offset in found["data_offsets"]]

    return change


# embed_tokens is 16 x 256 BF16 = 8192 bytes at 0, up_proj 512 x 256 BF16 = 262144 bytes behind it.
_HEADERS = [
    Case("empty file", written(FIRST, b""), (FIRST, "empty"), AGAIN),
    Case("shorter than a length", written(FIRST, b"abc"), (FIRST, "3 bytes", "8"), AGAIN),
    Case("header beyond the file", header_text(b"{}", 100), (FIRST, "100", "2"), AGAIN),
    Case(
        "header over 100 MB",
        header_text(b"{}", 100_000_001),
        (FIRST, "100000001", "100000000"),
        "is it a safetensors file?",
    ),
    Case(
        "a web page instead",
        written(FIRST, b"<!DOCTYPE html><html>"),
        (FIRST, "an HTML page"),
        "fetch the file again",
    ),
    Case("header not JSON", header_text(b'{"a":'), (FIRST, "JSON"), AGAIN),
    Case("header not an object", header_text(b"[1, 2]"), (FIRST, "object"), AGAIN),
    Case("header begins with a space", header_text(b" {}"), (FIRST, "object"), AGAIN),
    Case("header not UTF-8", header_text(b'{"\xff": 1}'), (FIRST, "UTF-8", "byte 2"), AGAIN),
    Case("header nested deep", header_text(b'{"a":' * 9000 + b"1" + b"}" * 9000), (FIRST, "nested"), AGAIN),
    Case(
        "header with a key twice",
        header_text(b'{"a": 1, "a": 2}'),
        (FIRST, "duplicate key 'a'"),
        "write the file again",
    ),
    Case("metadata not strings", header(lambda e: e.update(__metadata__={"a": 1})), (FIRST, "__metadata__"), AGAIN),
    Case("unknown dtype", entry(UP_WEIGHT, dtype="F7"), (FIRST, UP_WEIGHT, "'F7'", "BF16"), "known are"),
    Case("newline in a tensor's name", header(_named("a\nb\x1b[31m")), (FIRST, "a\\nb\\x1b[31m", "'F7'"), "known are"),
    Case("unknown field", entry(UP_WEIGHT, extra=1), (FIRST, UP_WEIGHT, "extra", "data_offsets"), AGAIN),
    Case("negative offsets", entry(UP_WEIGHT, data_offsets=[-8, 2]), (FIRST, UP_WEIGHT, "[-8, 2]"), AGAIN),
    Case("offsets backwards", entry(UP_WEIGHT, data_offsets=[9, 2]), (FIRST, UP_WEIGHT, "[9, 2]", "262144"), AGAIN),
    Case("fractional shape", entry(UP_WEIGHT, shape=[512, 256.0]), (FIRST, UP_WEIGHT, "[512, 256.0]"), AGAIN),
    Case(
        "shape and bytes disagree",
        entry(UP_WEIGHT, shape=[512, 255]),
        (FIRST, UP_WEIGHT, "[512, 255]", "261120", "262144"),
        AGAIN,
    ),
    Case(
        "shape overflows",
        entry(UP_WEIGHT, shape=[2**32, 2**32]),
        (FIRST, UP_WEIGHT, f"[{2**32}, {2**32}]", "overflow"),
        AGAIN,
    ),
    Case("tensors overlap", shifted(UP_WEIGHT, -2), (FIRST, UP_WEIGHT, EMBED, "8190", "8192", "overlap"), AGAIN),
    Case(
        "tensors leave a hole",
        shifted(UP_WEIGHT, 8, bytes(8)),
        (FIRST, UP_WEIGHT, EMBED, "8200", "8192", "hole"),
        AGAIN,
    ),
    Case(
        "tensors leave a hole, entries unsorted",
        shifted(UP_WEIGHT, 8, bytes(8), reverse=True),
        (FIRST, UP_WEIGHT, EMBED, "8200", "8192", "hole"),
        AGAIN,
    ),
    Case("hole at the start", shifted(EMBED, 8, bytes(8)), (FIRST, EMBED, "begins at 8", "ends at 0", "hole"), AGAIN),
    Case(
        "offsets far beyond the file",
        header(_moved(LAST, 10**12)),
        (FIRST, LAST, str(10**12 + 534272), "ends at 534272", "hole"),
        AGAIN,
    ),
    Case("data cut short", resized(FIRST, -100), (FIRST, LAST, "536704", "536604"), AGAIN),
    Case("bytes after the last tensor", resized(FIRST, 16), (FIRST, LAST, "16 bytes after the last tensor"), AGAIN),
]

_FOLDERS = [
    Case(
        "index names a missing file",
        mapped(GATE_WEIGHT, "gone.safetensors"),
        (INDEX, GATE_WEIGHT, "gone.safetensors"),
        AGAIN,
    ),
    Case("file missing", removed(SECOND), (INDEX, SECOND), AGAIN),
    Case(
        "index leads to ..",
        mapped(GATE_WEIGHT, "../x.safetensors"),
        (INDEX, GATE_WEIGHT, "'../x.safetensors'"),
        NOT_HERE,
    ),
    Case("index leads to a root", mapped(GATE_WEIGHT, "/etc/passwd"), (INDEX, GATE_WEIGHT, "'/etc/passwd'"), NOT_HERE),
    Case("index leads into a folder", mapped(GATE_WEIGHT, "a/b"), (INDEX, GATE_WEIGHT, "'a/b'"), NOT_HERE),
    Case(
        "index names no string", edited_json(INDEX, lambda i: i["weight_map"].update(a=1)), (INDEX, "a", "1"), NOT_HERE
    ),
    Case("index without a map", written(INDEX, b"{}"), (INDEX, "weight_map"), "own index"),
    Case("index not JSON", written(INDEX, b"{"), (INDEX, "JSON"), AGAIN),
    Case(
        "dangling link",
        both(removed(FIRST), lambda folder: (folder / FIRST).symlink_to(folder / "gone")),
        (INDEX, FIRST, "a link to", "model/gone"),
        "is that disk mounted?",
    ),
    Case(
        "folder in a file's place",
        both(removed(FIRST), lambda folder: (folder / FIRST).mkdir()),
        (INDEX, FIRST),
        "which is a folder",
    ),
    Case(
        "index names a tensor that its file lacks",
        mapped(GATE_WEIGHT, FIRST),
        (INDEX, GATE_WEIGHT, FIRST, SECOND),
        "put the index of these files there",
    ),
    Case(
        "index names a dense tensor that no file has",
        mapped(f"{GATE}.bias", FIRST),
        (INDEX, f"{GATE}.bias", FIRST, "no file"),
        "put the index of these files there",
    ),
    Case(
        "index lacks a dense tensor",
        mapped(GATE_WEIGHT, None),
        (INDEX, GATE_WEIGHT, SECOND),
        "is the index of these files?",
    ),
    Case(
        "tensor in two files",
        header(lambda entries: entries.update({GATE_WEIGHT: entries.pop(UP_WEIGHT)})),
        (GATE_WEIGHT, f"{FIRST} (12 tensors)", f"{SECOND} (11 tensors)", INDEX),
        "put the files of one version there",
    ),
    Case(
        "two indexes",
        lambda folder: shutil.copy(folder / INDEX, folder / "other.safetensors.index.json"),
        (INDEX, "other.safetensors.index.json", f"transformers and vLLM both take what {INDEX} names"),
        f"--index {INDEX} or --index other.safetensors.index.json",
    ),
    Case("no safetensors file", removed(FIRST, SECOND, INDEX), ("model", "no safetensors file"), "give"),
    Case("source missing", shutil.rmtree, ("model", "no such folder"), "give"),
    Case("source is a file", _as_file, ("model", "not a folder"), "give the folder"),
    Case("config not JSON", written("config.json", b"{"), ("config.json", "JSON"), AGAIN),
    Case(
        "config with a key twice",
        written("config.json", b'{"a": 1, "a": 2}'),
        ("config.json", "duplicate key 'a'"),
        "keep one of the two",
    ),
    Case(
        "config with half a surrogate pair",
        config(model_type="\ud800"),
        ("config.json", "escape"),
        AGAIN,
    ),
    Case(
        "newline in an index's name",
        edited_json(INDEX, lambda i: i["weight_map"].update({f"{GATE}.a\nb": "c\x1bd"})),
        (INDEX, f"{GATE}.a\\nb", "c\\x1bd", "missing"),
        AGAIN,
    ),
    Case(
        "config not an object",
        written("config.json", b"[]"),
        ("config.json", "list", "object"),
        "put the file of this checkpoint there",
    ),
    Case(
        "config lacks a size",
        config(hidden_size=None),
        ("config.json", "hidden_size", "None"),
        "is it a language model's config?",
    ),
]

CASES = [*(replace(case, error=HeaderError) for case in _HEADERS), *_FOLDERS]
