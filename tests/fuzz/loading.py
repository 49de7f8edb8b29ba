"""load_shard, or load_tensors, over a damaged set."""

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz import truth
from tests.fuzz.subjects import TP, Made
from tests.support.builders import Raw

if TYPE_CHECKING:
    import torch

    from reshard_runtime.shard import Shard
    from tests.fuzz.runs import Run

_NAMES = {"int8": "I8", "int32": "I32", "int64": "I64", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMES |= {"float8_e4m3fn": "F8_E4M3", "uint8": "U8"}


def loads(rng: random.Random, made: Made, out: Path, weights_changed: bool) -> "list[Run]":
    """Each rank's shard. weights_changed: only the digests tell."""
    from tests.fuzz.runs import Run

    found = []
    for rank in range(TP):
        verify = "digest" if weights_changed or rng.random() < 0.5 else "header"
        keep: dict[str, Any] = {}
        load = _load if made.subject.key == "denseffn" else _load_tensors
        call = functools.partial(load, out, rank, verify, keep)
        prove = _proof if made.subject.key == "denseffn" else _proof_of_tensors
        proof = functools.partial(prove, made, rank, keep)
        name = "load_shard" if made.subject.key == "denseffn" else "load_tensors"
        line = (f"{name}({str(out)!r}, {rank}, verify={verify!r})",)
        found.append(Run(line, proof, call))
    return found


def _load(out: Path, rank: int, verify: Any, keep: dict[str, Any]) -> None:
    from reshard_runtime import load_shard

    keep["stored"] = load_shard(out, rank, verify=verify, dequantize=False)
    keep["computed"] = load_shard(out, rank, verify=verify)


def _load_tensors(out: Path, rank: int, verify: Any, keep: dict[str, Any]) -> None:
    from reshard_runtime import load_tensors

    keep["stored"] = load_tensors(out, rank, verify=verify)


def _proof_of_tensors(made: Made, rank: int, keep: dict[str, Any]) -> bool:
    found = {name: _raw(tensor) for name, tensor in keep.pop("stored").items()}
    truth.check_loaded(found, made.dense, TP, rank, made.share, made.subject.key)
    return True


def _proof(made: Made, rank: int, keep: dict[str, Any]) -> bool:
    from reshard_runtime import load_shard

    stored, computed = keep.pop("stored"), keep.pop("computed")
    right = load_shard(made.whole, rank, dequantize=False)
    truth.check_loaded(_raws(stored), made.dense, TP, rank, made.share, made.subject.key)
    said, wanted = _meaning(stored), _meaning(right)
    for key, value in wanted.items():
        assert said[key] == value, f"loaded {key} is {said[key]}, expected {value}"
    if made.subject.spec.recipe == "fp8_block":
        raws, values = _raws(stored), _raws(computed)
        for name, raw in raws.items():
            if name.endswith(".weight"):
                expected = truth.dequantized(raw, raws[f"{name}_scale_inv"], 128)
                assert values[name][2] == expected, f"{name}: dequantized to other values"
    return True


def _raws(shard: "Shard") -> dict[str, Raw]:
    return {
        f"model.layers.{index}.mlp.{linear.name.rpartition('.')[2]}.{suffix}": _raw(tensor)
        for index, layer in shard.layers.items()
        for linear in layer.linears
        for suffix, tensor in linear.tensors.items()
    }


def _raw(tensor: "torch.Tensor") -> Raw:
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), data


def _meaning(shard: "Shard") -> dict[str, Any]:
    """What is computed with the tensors."""
    return {
        "sizes": (shard.tp_rank, shard.tp_size, shard.hidden_size, shard.intermediate_size),
        "layers": {index: (layer.tp_rank, layer.share, layer.activation) for index, layer in shard.layers.items()},
        "linears": {
            (linear.name, linear.scheme, linear.block) for layer in shard.layers.values() for linear in layer.linears
        },
    }
