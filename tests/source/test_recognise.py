"""What stands in a file's place: named by its first bytes wherever a header, an index, a config or a set is read."""

import gzip
import json
from pathlib import Path

import pytest

from reshard.errors import HeaderError, ReshardError
from reshard.model.naming import shard_file
from reshard.plan.pipeline import Cut
from reshard.source.recognise import rank_files, recognised
from reshard_runtime.loader import load_shard
from tests.support.builders import Spec, build
from tests.support.corrupt import FIRST, INDEX, SECOND
from tests.support.running import reshard, split

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 8589934592\n"
INSTEAD = {
    "pointer": (POINTER, ("a Git LFS pointer", "git lfs pull")),
    "page": (b'\n<!DOCTYPE HTML PUBLIC "-//W3C">\n<html>', ("an HTML page", "fetch the file again")),
    "page without a doctype": (b"<HTML><head>", ("an HTML page",)),
    "error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', ("an XML text",)),
    "answer of the Hub": (b"Entry not found", ("an answer of the Hub", "revision")),
    "answer in JSON": (
        b'{"error":"Access to model a/b is restricted"}',
        ('{"error":"Access to model a/b', "the token"),
    ),
    "answer of ModelScope": (b'{\n "Code": 404, "Message": "not found"}', ("an answer of a server", '{ "Code": 404,')),
    "xet pointer": (b"# xet version 0\nfilesize = 1234\nhash = 'abc'\n", ("a Git Xet pointer", "hf download")),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), ("a GGUF file", "safetensors checkpoint it was made from")),
    "torch.save": (b"PK\x03\x04" + bytes(100), ("PyTorch file", "save_pretrained")),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ("pickle", "save_pretrained")),
    "gzip": (gzip.compress(b"{}"), ("gzip-compressed", "unpack")),
    "utf-16": ("{}".encode("utf-16"), ("UTF-16", "UTF-8")),
    "zeros": (bytes(5000), ("zeros", "finish it, or download the file again")),
    "link": (b"../../blobs/0123abcd", ("../../blobs/0123abcd", "a symbolic link that was copied as text", "cp -rL")),
}


def _is_named(message: str, file: str, what: str) -> None:
    assert f"{file}: " in message
    for text in INSTEAD[what][1]:
        assert text in message
    assert "\n" not in message.strip()


FILES = [FIRST, INDEX, "config.json", "quant_model_description.json"]


@pytest.mark.parametrize(("what", "file"), [(what, FILES[n % 4]) for n, what in enumerate([*INSTEAD, *INSTEAD])])
def test_in_the_place_of_a_checkpoint_s_file(what: str, file: str, tmp_path: Path) -> None:
    """Each in two of the files, by turns."""
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    (tmp_path / "model" / file).write_bytes(INSTEAD[what][0])
    done = reshard("split", tmp_path / "model", tmp_path / "out", "--tp", 2)
    assert done.code == 1
    _is_named(done.err, file, what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["pointer", "page", "link"])
def test_in_the_place_of_a_config_alone(what: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(INSTEAD[what][0])
    done = reshard("check", "--config", path, "--tp", 2)
    assert done.code == 1
    _is_named(done.err, str(path), what)


@pytest.mark.parametrize("what", ["pointer", "page", "link"])
def test_in_the_place_of_a_manifest(what: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "out", Cut(1))
    path = tmp_path / "out" / "manifest.json"
    path.write_bytes(INSTEAD[what][0])
    _is_named(reshard("verify", tmp_path / "out").err, "manifest.json", what)
    with pytest.raises(ReshardError) as caught:
        load_shard(tmp_path / "out", 0)
    _is_named(str(caught.value), str(path), what)


@pytest.mark.parametrize("what", ["pointer", "page", "link"])
def test_in_the_place_of_a_shard(what: str, tmp_path: Path) -> None:
    """A set that was pushed to a repository and cloned without its big files: the runtime says the same."""
    build(tmp_path / "model", Spec())
    split(tmp_path / "model", tmp_path / "out", Cut(1))
    path = tmp_path / "out" / shard_file(0, 1)
    # In the size that the manifest names, as far as that can be: what is shorter is refused for its size before.
    path.write_bytes(INSTEAD[what][0].ljust(path.stat().st_size, b"\n") if what != "link" else INSTEAD[what][0])
    with pytest.raises(ReshardError) as caught:
        load_shard(tmp_path / "out", 0)
    if what == "link":
        assert "20 bytes, manifest.json says" in str(caught.value)
    else:
        _is_named(str(caught.value), str(path), what)


def test_a_good_header_may_begin_with_anything(tmp_path: Path) -> None:
    """A length of 0x8b1f: its first two bytes are gzip's. The table is asked only where a header cannot be read."""
    raw = b"{}".ljust(0x8B1F)
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert recognised((tmp_path / "model.safetensors").read_bytes()[:512], "x", 9) is not None
    assert "no dense layer" in reshard("inspect", tmp_path).err


@pytest.mark.parametrize("mark", [".aria2", ".incomplete", ".part"])
def test_zeros_beside_the_mark_of_a_download(mark: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    (tmp_path / "model" / FIRST).write_bytes(bytes(70_000))
    (tmp_path / "model" / (FIRST + mark)).write_bytes(b"\0\1")
    done = reshard("inspect", tmp_path / "model")
    assert done.code == 1
    assert f"{FIRST}{mark} beside it says that its download is not finished" in done.err
    assert "again" not in done.err.replace("start it again", "")


def test_a_whole_header_beside_the_mark_of_a_download(tmp_path: Path) -> None:
    """The header came first; what is still to come would be cut as zeros."""
    build(tmp_path / "model", Spec())
    (tmp_path / "model" / f"{SECOND}.aria2").write_bytes(b"\0\1")
    done = reshard("split", tmp_path / "model", tmp_path / "out", "--tp", 2)
    assert done.code == 1
    assert f"{SECOND}: {SECOND}.aria2 beside it says that its download is not finished" in done.err
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    build(tmp_path / "model", Spec("modelslim_dynamic"))
    split(tmp_path / "model", tmp_path / "right", Cut(2))
    for path in (tmp_path / "model").glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    split(tmp_path / "model", tmp_path / "out", Cut(2))
    for path in (tmp_path / "right").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,, "b": 2}', "line 1 column 9 (char 8); mend it there"),
        ('{"a": 1, "b"', "copy or download it again"),
        ('{"a": 1, "a": 1}', "config.json: duplicate key 'a'; keep one of the two, or write the file again"),
        ('{"x": {"b": 1, "b": 2}}', "config.json: duplicate key 'b'; keep one of the two, or write the file again"),
    ],
)
def test_json_that_was_edited_and_json_that_is_cut_short(text: str, said: str, tmp_path: Path) -> None:
    build(tmp_path / "model", Spec())
    (tmp_path / "model" / "config.json").write_text(text)
    done = reshard("inspect", tmp_path / "model")
    assert done.code == 1
    assert said in done.err
    assert ("download" in done.err) == ("download" in said)


RANKS = {
    "model0-mp8.safetensors": "DeepSeek's inference/convert.py",
    "model-rank-3-part-0.safetensors": "vLLM's save_sharded_state",
    "pytorch_model-00006-TP-003.safetensors": "Grok-2",
    "rank0.safetensors": "TensorRT-LLM",
}


@pytest.mark.parametrize("file", list(RANKS))
@pytest.mark.parametrize("indexed", [True, False])
def test_files_of_ranks_are_cut_already(file: str, indexed: bool, tmp_path: Path) -> None:
    tensors = build(tmp_path / "model", Spec(files=1))
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.rename(tmp_path / "model" / file)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    if not indexed:
        (tmp_path / "model" / INDEX).unlink()
    done = reshard("check", tmp_path / "model", "--tp", 2)
    assert done.code == 1
    assert f"{file}: already cut per rank, by " in done.err
    assert RANKS[file] in done.err
    assert "give the original checkpoint" in done.err
    assert "stale" not in done.err


def test_files_of_a_checkpoint_are_none_of_ranks() -> None:
    assert rank_files(["model.safetensors", FIRST, "quant_model_weights-00001-of-00002.safetensors"]) is None


def test_the_message_of_the_header_stays_where_nothing_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    done = reshard("inspect", tmp_path)
    assert done.code == HeaderError.exit_code
    assert "model.safetensors: header: not valid JSON" in done.err
