"""load_shard over a damaged set."""

import functools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz import truth
from tests.fuzz.subjects import TP, Made
from tests.support.builders import Raw

if TYPE_CHECKING:
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
        call = functools.partial(_load, out, rank, verify, keep)
        proof = functools.partial(_proof, made, rank, keep)
        line = (f"load_shard({str(out)!r}, {rank}, verify={verify!r})",)
        found.append(Run(line, proof, call))
    return found


def _load(out: Path, rank: int, verify: Any, keep: dict[str, Any]) -> None:
    from reshard_runtime import load_shard

    keep["stored"] = load_shard(out, rank, verify=verify, dequantize=False)
    keep["computed"] = load_shard(out, rank, verify=verify)


def _proof(made: Made, rank: int, keep: dict[str, Any]) -> bool:
    from reshard_runtime import load_shard

    stored, computed = keep.pop("stored"), keep.pop("computed")
    right = load_shard(made.whole, rank, dequantize=False)
    truth.check_loaded(_raws(stored), made.dense, TP, rank, made.share)
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
    import torch

    found: dict[str, Raw] = {}
    for index, layer in shard.layers.items():
        for linear in layer.linears:
            for suffix, tensor in linear.tensors.items():
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                kind = _NAMES[str(tensor.dtype).removeprefix("torch.")]
                found[f"model.layers.{index}.mlp.{linear.name.rpartition('.')[2]}.{suffix}"] = (
                    kind,
                    tuple(tensor.shape),
                    data,
                )
    return found


def _meaning(shard: "Shard") -> dict[str, Any]:
    """What is computed with the tensors."""
    return {
        "sizes": (shard.tp_rank, shard.tp_size, shard.hidden_size, shard.intermediate_size),
        "layers": {index: (layer.tp_rank, layer.share, layer.activation) for index, layer in shard.layers.items()},
        "linears": {
            (linear.name, linear.scheme, linear.block) for layer in shard.layers.values() for linear in layer.linears
        },
    }
