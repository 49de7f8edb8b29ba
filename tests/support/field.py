"""Checkpoints as people have them, rebuilt from public reports, files and configs: `data/field/*.json`.

Each says where it is from, the fact that it stands for, and what a user may expect; `by hand` are those that no
report is behind. The tensors' names, types and
shapes are those of the report, made small; their bytes are made here, the same for the same name.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.builders import Raw, random_raw, write_safetensors
from tests.support.paths import DATA

CASES = {path.stem: path for path in sorted((DATA / "field").glob("*.json"))}
_BITS = {"F4": 4, "U8": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BOOL": 8}
_ONE_FOR_BOTH = ("input_scale", "input_offset", "input_zero_point")


def describe(name: str) -> dict[str, Any]:
    """A case: provenance, fact, expected, files."""
    case: dict[str, Any] = json.loads(CASES[name].read_text())
    return case


def build(name: str, folder: Path) -> Path:
    """Write a case's files into a new folder, and return it."""
    folder.mkdir()
    files = describe(name)["files"]
    for file, content in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_bytes(content.encode())
        elif "json" in content:
            path.write_text(json.dumps(content["json"], indent=1))
        elif "zeros" in content:
            path.write_bytes(bytes(content["zeros"]))
        elif "link" in content:
            path.symlink_to(content["link"])
        elif "tensors" in content:
            tensors = {tensor: _values(tensor, spec) for tensor, spec in content["tensors"].items()}
            write_safetensors(path, tensors, content.get("metadata"))
            if content.get("extra", 0) < 0:
                path.write_bytes(path.read_bytes()[: content["extra"]])
            elif "extra" in content:
                path.write_bytes(path.read_bytes() + bytes(content["extra"]))
    for file, content in files.items():
        if isinstance(content, dict) and "index" in content:
            beside = Path(file).parent
            names = {
                tensor: Path(other).name
                for other, held in files.items()
                if Path(other).parent == beside and isinstance(held, dict)
                for tensor in held.get("tensors", ())
            }
            (folder / file).write_text(json.dumps({**content["index"], "weight_map": names}))
    return folder


def _values(name: str, spec: list[Any]) -> Raw:
    """A tensor by its name, type and shape; `zero` before the type: zeros."""
    zero = spec[0] == "zero"
    dtype, *shape = spec[1:] if zero else spec
    if name.rpartition(".")[2] in _ONE_FOR_BOTH:
        name = name.replace("up_proj", "gate_proj")
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    if dtype in _BITS:
        size = int(np.prod(shape)) * _BITS[dtype] // 8
        made: Raw = (dtype, tuple(shape), rng.integers(1, 100, size, dtype=np.uint8).tobytes())
    elif dtype in {"I32", "I64"} and "deq_scale" not in name:
        made = (dtype, tuple(shape), rng.integers(-99, 99, shape, dtype={"I32": "<i4", "I64": "<i8"}[dtype]).tobytes())
    else:
        made = random_raw(rng, dtype, tuple(shape), scale="scale" in name and dtype != "F8_E4M3")
    return (dtype, tuple(shape), bytes(len(made[2]))) if zero else made
