"""What a file is that is not what its name says, by its first bytes: the one table of them.

Asked only where a file could not be read as what it should be: any byte may be the first one of a good header.
"""

import re
from collections.abc import Collection

PREFIX_BYTES = 512

_PYTORCH = "which is not read: convert it (transformers: from_pretrained(…).save_pretrained(OUT) writes safetensors)"
_PAGE = "a login, proxy or error page was saved in its place: open the address in a browser, then fetch the file again"
_ASK = "check the repository's name, the revision and the token"
_ANSWER = f"an answer of the Hub, saved in the file's place; {_ASK}"
_UNPACK = "unpack it, and give the folder with the files"

# (the first bytes, in small letters; what such a file is, and the way out)
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself; run `git lfs pull` there"),
    (b"<!doctype html", f"an HTML page; {_PAGE}"),
    (b"<html", f"an HTML page; {_PAGE}"),
    (b"<?xml", f"an XML text, as stores answer errors; {_PAGE}"),
    (b"entry not found", _ANSWER),
    (b"repository not found", _ANSWER),
    (b"invalid username or password", _ANSWER),
    (b"access to model ", _ANSWER),
    (b"# xet version", "a Git Xet pointer, not the file itself; get the file with `git xet`, or `hf download`"),
    (b"gguf", "a GGUF file, llama.cpp's format, which is not read; give the safetensors checkpoint it was made from"),
    (b"pk\x03\x04", f"a zip archive, or a PyTorch file (torch.save), {_PYTORCH}"),
    (b"\x80\x02", f"a Python pickle (PyTorch), {_PYTORCH}"),
    (b"\x89hdf\r\n", "an HDF5 file (Keras), which is not read; give the safetensors checkpoint"),
    (b"\x93numpy", "a NumPy array, which is not read; give the safetensors checkpoint"),
    (b"\x1f\x8b", f"gzip-compressed; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"zstd-compressed; {_UNPACK}"),
    (b"\xfd7zxz\x00", f"xz-compressed; {_UNPACK}"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)
# Of the Hub, ModelScope, GitHub and stores; no file of a checkpoint begins with one of these keys.
_JSON_ANSWER = re.compile(rb'\{\s*"(?:errors?|message|msg|detail|code|status|success|requestid)"\s*:')
_QUOTED = 120
_BOM = b"\xef\xbb\xbf"
_LINK = re.compile(rb"(?:\.{0,2}/)?(?:[\w.@+=-]+/)*[\w.@+=-]+")  # a path, and nothing besides
UNFINISHED = (".aria2", ".incomplete", ".part", ".crdownload", ".download")
"""What programs that download put behind the name of a file that they are at."""
UNFINISHED_FOLDER = "._____temp"
"""Where ModelScope keeps files until they are whole."""


def recognised(prefix: bytes, file: str, size: int, beside: Collection[str] = ()) -> str | None:
    """`FILE: what it is; the way out`, or None for what the table does not know.

    prefix: the file's first PREFIX_BYTES, or all; beside: the names of the other files there.
    """
    start = prefix.removeprefix(_BOM).lstrip().lower()
    what = next((what for beginning, what in _BEGINNINGS if start.startswith(beginning)), None)
    if what is None and _JSON_ANSWER.match(start):
        text = " ".join(prefix.decode(errors="replace").split())[:_QUOTED]
        what = f"an answer of a server ({text}), saved in the file's place; {_ASK}"
    if what is None and prefix and not prefix.strip(b"\0"):
        what = "zeros, space that a download has taken and not filled yet"
        what += f"; {partial}" if (partial := unfinished(file, beside)) else "; finish it, or download the file again"
    if what is None and size == len(prefix) and b"/" in prefix and _LINK.fullmatch(prefix):
        what = (
            f"text with the path {prefix.decode()}: a symbolic link that was copied as text; copy the folder again "
            "with what its links lead to (cp -rL, rsync -L)"
        )
    return what and f"{file}: {what}"


def unfinished(file: str, beside: Collection[str]) -> str | None:
    """The mark of a download that goes on, or was broken off, and the way out."""
    mark = next((file + ending for ending in UNFINISHED if file + ending in beside), None)
    return mark and f"{mark} beside it says that its download is not finished: let it finish, or start it again"


# Files that a program has cut for its own ranks already.
_OF_RANKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"model[0-9]+-mp[0-9]+\.safetensors"), "DeepSeek's inference/convert.py"),
    (re.compile(r"model-rank-[0-9]+-part-[0-9]+\.safetensors"), "vLLM's save_sharded_state"),
    (re.compile(r".+-TP-(?:[0-9]+|common)\.safetensors"), "the tensor-parallel saver of Grok-2"),
    (re.compile(r"rank[_-]?[0-9]+\.safetensors"), "TensorRT-LLM's convert_checkpoint"),
)


def rank_files(files: Collection[str]) -> tuple[list[str], str] | None:
    """The files that are one rank's each, and what program cut them so; None where there are none."""
    for pattern, program in _OF_RANKS:
        found = sorted(name for name in files if pattern.fullmatch(name))
        if found:
            return found, program
    return None
