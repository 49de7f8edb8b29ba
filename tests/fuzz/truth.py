"""Whether what was written or loaded is right, by numpy and by what stands in the source's files: none of the product.

Each raises AssertionError with what is wrong.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3

from tests.support import cut_by_hand
from tests.support.builders import Raw, read_safetensors
from tests.support.cut_by_hand import BLOCK, ITEMSIZE, Array, to_array

_NAMES = {
    "denseffn": r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.\w+",
    "o_proj": r"model\.layers\.(\d+)\.self_attn\.o_proj\.\w+",
    "lm_head": r"(?:model\.)?lm_head\.\w+",
    "embedding": r"(?:model\.)?embed_tokens\.\w+",
}
MANIFEST = "manifest.json"


def is_of(name: str, key: str, layers: int | None) -> bool:
    """Whether a name is that of a part's tensor, in one of so many layers."""
    match = re.fullmatch(_NAMES[key], name, re.ASCII)
    return match is not None and (layers is None or not match.groups() or int(match[1]) < layers)


def dense_of(folder: Path, key: str) -> dict[str, Raw]:
    """A part's tensors in a folder, as its files say it now; a file that nobody can read holds none."""
    found: dict[str, Raw] = {}
    layers = _layers(folder)
    mtp: set[str] = set()  # their layers, which names alone tell where no config says how many others there are
    for path in sorted(folder.glob("*.safetensors")):
        if not path.is_file() or path.stat().st_size > 100_000_000:
            continue
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            held = read_safetensors(path)
            dense = {name: raw for name, raw in held.items() if is_of(name, key, layers) and _is_whole(raw)}
            both = sorted(name for name in dense.keys() & found.keys() if dense[name] != found[name])
            assert not both, f"{both[0]} is in two files, and was taken from one"
            found |= dense
            mtp |= {name.removesuffix("eh_proj.weight") for name in held if name.endswith(".eh_proj.weight")}
    return {name: raw for name, raw in found.items() if layers is not None or not name.startswith(tuple(mtp))}


def _is_whole(raw: Raw) -> bool:
    dtype, shape, data = raw
    return dtype in ITEMSIZE and int(np.prod(shape, dtype=object)) * ITEMSIZE[dtype] == len(data)


def _layers(folder: Path) -> int | None:
    """How many layers the config says that the model has, MTP layers apart."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / "config.json").read_bytes())["num_hidden_layers"])
    return None


def blocks_of(folder: Path) -> list[int]:
    """The rows and columns that a scale stands for, where a config says it in the way of fp8."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return list(json.loads((folder / "config.json").read_bytes())["quantization_config"]["weight_block_size"])
    return [BLOCK, BLOCK]


def share_of(dense: dict[str, Raw], tp: int, multiple: int, key: str) -> int:
    """A rank's rows of gate, up to a multiple; of o_proj columns, of a table rows of the padded vocabulary."""
    weights = {name: raw[1] for name, raw in dense.items() if name.endswith(".weight")}
    sizes = {shape[key == "o_proj"] for name, shape in weights.items() if key != "denseffn" or ".gate_proj." in name}
    assert len(sizes) == 1, f"{len(sizes)} sizes"
    size = sizes.pop()
    if key in {"lm_head", "embedding"}:
        return -(-size // 64) * 64 // tp
    return -(-size // (tp * multiple)) * multiple


def check_cut(out: Path, dense: dict[str, Raw], tp: int, share: int, layout: str, key: str = "denseffn") -> None:
    """A set: its shards' bytes, its manifest's digests, and that its slices, taken from the source, give the shards."""
    cut_by_hand.check_set(out, dense, tp, share, layout, key)
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert [shard["tp_rank"] for shard in manifest["shards"]] == list(range(tp))
    for shard in manifest["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert (shard["size"], shard["blake3"]) == (len(data), blake3(data).hexdigest()), f"{shard['file']}: digest"
        held = read_safetensors(out / shard["file"])
        assert sorted(tensor["name"] for tensor in shard["tensors"]) == sorted(held), f"{shard['file']}: other tensors"
        for tensor in shard["tensors"]:
            dtype, shape, raw = held[tensor["name"]]
            assert (tensor["dtype"], tuple(tensor["shape"])) == (dtype, shape), f"{tensor['name']}: type or shape"
            assert tensor["blake3"] == blake3(raw).hexdigest(), f"{tensor['name']}: digest"
            made = _of_slices(tensor, dense)
            assert made.tobytes() == raw, f"{shard['file']}: {tensor['name']}: its slices give other bytes"
    for file in manifest["files"]:
        data = (out / file["name"]).read_bytes()
        assert (file["size"], file["blake3"]) == (len(data), blake3(data).hexdigest()), f"{file['name']}: digest"


def _of_slices(tensor: dict[str, Any], dense: dict[str, Raw]) -> Array:
    made = np.zeros(tensor["shape"], cut_by_hand.UNSIGNED[ITEMSIZE[tensor["dtype"]]])
    for piece in tensor["slices"]:
        source = to_array(dense[piece["tensor"]])
        assert list(source.shape) == piece["shape"], f"{piece['tensor']}: shape"
        if not source.shape:
            made[...] = source
            continue
        part = np.moveaxis(source, piece["dim"], 0)[piece["start"] : piece["stop"]]
        np.moveaxis(made, piece["dim"], 0)[piece["at"] : piece["at"] + len(part)] = part
    for other in tensor.get("same_as", ()):
        assert dense[other] == dense[tensor["slices"][0]["tensor"]], f"{other} is not the same"
    return made


def check_merged(out: Path, dense: dict[str, Raw], side_files: dict[str, bytes]) -> None:
    """A merged checkpoint: every tensor, the index, and the files beside it."""
    held: dict[str, Raw] = {}
    homes: dict[str, str] = {}
    for path in sorted(out.glob("*.safetensors")):
        found = read_safetensors(path)
        held |= found
        homes |= dict.fromkeys(found, path.name)
    assert held.keys() == dense.keys(), f"other tensors: {sorted(held.keys() ^ dense.keys())[:4]}"
    for name, raw in dense.items():
        assert held[name][:2] == raw[:2], f"{name}: type or shape"
        assert held[name][2] == raw[2], f"{name}: other bytes"
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == homes, "the index says otherwise"
    expected = {*homes.values(), *side_files, "model.safetensors.index.json"}
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert there == expected, f"other files: {sorted(there ^ expected)[:4]}"
    for name, data in side_files.items():
        assert (out / name).read_bytes() == data, f"{name}: other bytes"


def check_loaded(tensors: dict[str, Raw], dense: dict[str, Raw], tp: int, rank: int, share: int, key: str) -> None:
    """What a rank has loaded, as stored: fused, whatever the layout."""
    wanted = cut_by_hand.expected_of(key, dense, tp, rank, share, "fused")
    assert tensors.keys() == wanted.keys(), f"other tensors: {sorted(tensors.keys() ^ wanted.keys())[:4]}"
    for name, raw in wanted.items():
        assert tensors[name][:2] == raw[:2], f"{name}: type or shape: {tensors[name][:2]}, expected {raw[:2]}"
        assert tensors[name][2] == raw[2], f"{name}: other bytes"


def dequantized(weight: Raw, scale: Raw, block: int) -> bytes:
    """A block-quantized FP8 weight as BF16: stored * scale of its block in float32, rounded once."""
    values = np.frombuffer(weight[2], ml_dtypes.float8_e4m3fn).reshape(weight[1]).astype(np.float32)
    kinds = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
    scales = np.frombuffer(scale[2], kinds[scale[0]]).reshape(scale[1]).astype(np.float32)
    spread = np.repeat(np.repeat(scales, block, 0), block, 1)[: weight[1][0], : weight[1][1]]
    with np.errstate(all="ignore"):
        return (values * spread).astype(ml_dtypes.bfloat16).tobytes()


def as_bf16(dense: dict[str, Raw]) -> dict[str, Raw] | None:
    """What FP8 weights are in BF16; None where one is no number, which has many bits."""
    found: dict[str, Raw] = {}
    for name, raw in dense.items():
        if name.endswith(".weight"):
            if any(code & 127 == 127 for code in raw[2]):
                return None
            found[name] = ("BF16", raw[1], dequantized(raw, dense[f"{name}_scale_inv"], BLOCK))
    return found


def check_meaning(out: Path, right: Path) -> None:
    """That a manifest promises what the right one does, wherever it says that the weights are from."""
    found, wanted = (json.loads((folder / MANIFEST).read_bytes()) for folder in (out, right))
    for said in (found, wanted):
        for key in ("generator", "source", "files", "blake3"):
            said.pop(key, None)
        said["layers"].sort(key=lambda layer: int(layer["index"] or 0))
        for shard in said["shards"]:
            shard["tensors"].sort(key=lambda tensor: str(tensor["name"]))
            for tensor in shard["tensors"]:
                del tensor["slices"]  # compared with the bytes, piece by piece
    found, wanted = _said(found), _said(wanted)
    for key in sorted(wanted.keys() | found.keys()):
        assert found.get(key) == wanted.get(key), f"{MANIFEST}: {key} is not what was written"


def _said(value: Any) -> Any:
    """Without what may be left out: null, and lists of nothing."""
    if isinstance(value, dict):
        return {key: _said(inner) for key, inner in value.items() if inner is not None and inner != []}
    return [_said(inner) for inner in value] if isinstance(value, list) else value
