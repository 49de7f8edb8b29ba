"""What a rank holds, by the table of the format written out by hand: numpy on raw bytes, no plan."""

from pathlib import Path

import numpy as np

from tests.support.builders import Raw, read_safetensors

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ITEMSIZE = {"I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}
BLOCK, GROUP = 128, 32

Array = np.ndarray


def to_array(raw: Raw) -> Array:
    dtype, shape, data = raw
    return np.frombuffer(data, UNSIGNED[ITEMSIZE[dtype]]).reshape(shape)


def scale_block(suffix: str, weight: Array, scale: Array) -> tuple[int, int]:
    """The rows and columns of the weight that an element stands for; (1, 0) of what has none along in."""
    if suffix not in {"weight_scale", "weight_scale_inv"} or scale.shape in {(len(weight),), (len(weight), 1)}:
        return 1, 0
    return (1, GROUP) if len(scale) == len(weight) else (BLOCK, BLOCK)


def is_scalar(suffix: str, array: Array) -> bool:
    return suffix in {"input_scale", "input_offset", "input_zero_point"} or array.shape == (1,)


def zeros_behind(array: Array, dim: int, length: int) -> Array:
    missing = [(0, 0)] * array.ndim
    missing[dim] = (0, length - array.shape[dim])
    return np.pad(array, missing)


def rows_of(array: Array, tp: int, rank: int, local: int) -> Array:
    """Column-parallel: rows rank·local..(rank+1)·local, the matrix padded first."""
    return zeros_behind(array, 0, local * tp)[rank * local : (rank + 1) * local]


def columns_of(array: Array, tp: int, rank: int, local: int) -> Array:
    """Row-parallel: columns rank·local..(rank+1)·local."""
    return zeros_behind(array, 1, local * tp)[:, rank * local : (rank + 1) * local]


def column_parallel(suffix: str, weight: Array, array: Array, tp: int, rank: int, share: int) -> Array:
    """A rank's rows. `share`: of the padded size."""
    if is_scalar(suffix, array):
        return array
    return rows_of(array, tp, rank, -(-share // scale_block(suffix, weight, array)[0]))


def row_parallel(suffix: str, weight: Array, array: Array, tp: int, rank: int, share: int) -> Array:
    """A rank's columns, and of what belongs to the rows all; the bias, which is added once, on rank 0."""
    if suffix == "weight":
        return columns_of(array, tp, rank, share)
    if not is_scalar(suffix, array) and (unit := scale_block(suffix, weight, array)[1]):
        return columns_of(array, tp, rank, -(-share // unit))
    return np.zeros_like(array) if suffix == "quant_bias" and rank > 0 else array


def expected_rank(dense: dict[str, Raw], tp: int, rank: int, share: int, layout: str) -> dict[str, Raw]:
    """One rank's tensors. `share`: the rank's part of the padded intermediate size."""
    found: dict[str, Raw] = {}
    prefixes = sorted({name.rsplit(".", 2)[0] for name in dense})
    for prefix in prefixes:
        arrays = {name.removeprefix(f"{prefix}."): to_array(raw) for name, raw in dense.items() if prefix in name}
        local: dict[str, Array] = {}
        for suffix in (name.removeprefix("gate_proj.") for name in arrays if name.startswith("gate_proj.")):
            gate, up = (arrays[f"{role}.{suffix}"] for role in ("gate_proj", "up_proj"))
            weight = arrays["gate_proj.weight"]
            pieces = [column_parallel(suffix, weight, array, tp, rank, share) for array in (gate, up)]
            if is_scalar(suffix, gate):
                fused = gate
                assert layout == "separate" or np.array_equal(gate, up)
            else:
                fused = np.concatenate(pieces)
            local |= (
                {f"gate_up_proj.{suffix}": fused}
                if layout == "fused"
                else {f"gate_proj.{suffix}": pieces[0], f"up_proj.{suffix}": pieces[1]}
            )
        for suffix in (name.removeprefix("down_proj.") for name in arrays if name.startswith("down_proj.")):
            weight, down = arrays["down_proj.weight"], arrays[f"down_proj.{suffix}"]
            local[f"down_proj.{suffix}"] = row_parallel(suffix, weight, down, tp, rank, share)
        for name, array in local.items():
            origin = dense[f"{prefix}.{name.replace('gate_up_proj', 'gate_proj')}"]
            found[f"{prefix}.{name}"] = (origin[0], array.shape, array.tobytes())
    return found


CUTS = {"o_proj": row_parallel, "lm_head": column_parallel, "embedding": column_parallel}


def expected_of(key: str, tensors: dict[str, Raw], tp: int, rank: int, share: int, layout: str) -> dict[str, Raw]:
    """The same of any part; those whose linears stand alone keep their names."""
    if key == "denseffn":
        return expected_rank(tensors, tp, rank, share, layout)
    found: dict[str, Raw] = {}
    for name, raw in tensors.items():
        module, _, suffix = name.rpartition(".")
        array = CUTS[key](suffix, to_array(tensors[f"{module}.weight"]), to_array(raw), tp, rank, share)
        found[name] = (raw[0], array.shape, array.tobytes())
    return found


def check_set(
    folder: Path, tensors: dict[str, Raw], tp: int, share: int, layout: str = "fused", key: str = "denseffn"
) -> None:
    """A set's shards. tensors: the part's in the source."""
    shards = [f"{key}-rank-{rank:05d}-of-{tp:05d}.safetensors" for rank in range(tp)]
    assert sorted(path.name for path in folder.glob("*-rank-*.safetensors")) == shards
    for rank, file in enumerate(shards):
        got, wanted = read_safetensors(folder / file), expected_of(key, tensors, tp, rank, share, layout)
        assert got.keys() == wanted.keys()
        for name, raw in wanted.items():
            assert got[name][:2] == raw[:2], f"{file}: {name}"
            assert got[name][2] == raw[2], f"{file}: {name}: other bytes"
