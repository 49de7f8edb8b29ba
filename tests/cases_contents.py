"""Bad contents: checkpoints whose parts contradict one another, cuts that do not fit, shard sets that are not whole."""

import json
import shutil
from pathlib import Path

from reshard.errors import AlignmentError, ManifestError, SchemeError, SourceError
from reshard.naming import shard_file
from tests.builders import Raw, Spec, _compressed, build
from tests.corrupt import (
    DESCRIPTION,
    DOWN,
    GATE,
    UP,
    Case,
    both,
    config,
    described,
    edited_json,
    removed,
    resized,
    tensors,
    with_tensor,
    without,
    write,
    written,
)

AGAIN = "again"
SLIM, FP8 = Spec("modelslim_dynamic"), Spec("fp8_block")
RANK_1 = shard_file(1, 2)


def _transposed_down(every: dict[str, Raw]) -> None:
    dtype, (out, in_), data = every[f"{DOWN}.weight"]
    every[f"{DOWN}.weight"] = (dtype, (in_, out), data)


def _int4(folder: Path) -> None:
    """compressed-tensors W4A16 as llm-compressor packs it: no `weight`, but three tensors in its place."""
    packed = {"weight_packed": ("I32", 4, 8), "weight_scale": ("BF16", 2, 128), "weight_shape": ("I64", 8, 0)}

    def change(every: dict[str, Raw]) -> None:
        for name in [name for name in every if name.endswith("_proj.weight") and ".experts." not in name]:
            dtype, shape, _ = every[name]
            if dtype != "I8":
                continue
            del every[name]
            every.pop(f"{name}_scale")
            for suffix, (kind, size, per) in packed.items():
                made = (shape[0], shape[1] // per) if per else (2,)
                count = made[0] * made[1] if per else 2
                every[name.removesuffix("weight") + suffix] = (kind, made, bytes(count * size))

    tensors(change)(folder)
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
        "input_activations": None,
    }
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    config(quantization_config=quantization)(folder)


def _only_experts(folder: Path) -> None:
    shutil.rmtree(folder)
    build(folder, Spec(dense=0))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _unequal_scales(folder: Path) -> None:
    """gate's input_scale is 2.0, up's 3.0, as BF16."""
    values = {GATE: b"\x00\x40", UP: b"\x40\x40"}
    tensors(lambda every: every.update({f"{m}.input_scale": ("BF16", (1,), v) for m, v in values.items()}))(folder)


def _flipped(file: str, at: int) -> object:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / file).read_bytes())
        raw[at] ^= 1
        write(folder / file, bytes(raw))

    return damage


_NAMES = [
    Case("gate without up", without(f"{UP}.weight"), (f"{UP}.weight", "missing", "gate_proj.weight"), AGAIN),
    Case("up without gate", without(f"{GATE}.weight"), (f"{GATE}.weight", "missing", "up_proj.weight"), AGAIN),
    Case("no down", without(f"{DOWN}.weight"), (f"{DOWN}.weight", "missing", "up_proj.weight"), AGAIN),
    Case(
        "weight without its scale",
        without(f"{UP}.weight_scale"),
        (f"{UP}.weight_scale", "missing", "w8a8_dynamic", "config.json"),
        AGAIN,
        SchemeError,
        Spec("ct_dynamic"),
    ),
    Case(
        "fp8 weight without its scale",
        without(f"{DOWN}.weight_scale_inv"),
        (f"{DOWN}.weight_scale_inv", "missing", "fp8_block", "config.json"),
        AGAIN,
        SchemeError,
        FP8,
    ),
    Case(
        "scale without weight",
        without(f"{UP}.weight"),
        (f"{UP}.weight", "missing", "up_proj.weight_scale"),
        AGAIN,
        spec=Spec("ct_dynamic"),
    ),
    Case(
        "channel scale of a wrong shape",
        with_tensor(f"{UP}.weight_scale", "F32", (511, 1), 2044),
        (f"{UP}.weight_scale", "[511, 1]", "[512, 256]", "[512, 1]"),
        AGAIN,
        SchemeError,
        SLIM,
    ),
    Case(
        "block scale of a wrong shape",
        with_tensor(f"{UP}.weight_scale_inv", "F32", (4, 3), 48),
        (f"{UP}.weight_scale_inv", "[4, 3]", "[512, 256]", "[4, 2]"),
        AGAIN,
        SchemeError,
        FP8,
    ),
    Case(
        "weight of three dimensions",
        with_tensor(f"{UP}.weight", "BF16", (512, 256, 1), 262144),
        (f"{UP}.weight", "[512, 256, 1]"),
        "[out, in] is wanted",
        SchemeError,
    ),
    Case(
        "gate and up of different shapes",
        both(with_tensor(f"{UP}.weight", "BF16", (256, 256), 131072), _no_config),
        (f"{UP}.weight", f"{GATE}.weight", "[256, 256]", "[512, 256]"),
        AGAIN,
    ),
    Case(
        "gate and up of different types",
        with_tensor(f"{UP}.weight", "F16", (512, 256), 262144),
        (f"{UP}.weight", f"{GATE}.weight", "F16", "BF16"),
        "both must be the same",
        SchemeError,
    ),
    Case(
        "gate and up of different schemes",
        both(
            without(f"{UP}.weight_scale", f"{UP}.weight_offset"),
            with_tensor(f"{UP}.weight", "BF16", (512, 256), 262144),
            described(**{f"{UP}.weight": "FLOAT", f"{UP}.weight_scale": None, f"{UP}.weight_offset": None}),
        ),
        ("model.layers.0.mlp", "gate_proj is w8a8_dynamic", "up_proj is bf16"),
        "both must be the same",
        SchemeError,
        SLIM,
    ),
    Case(
        "unknown suffix",
        with_tensor(f"{UP}.bias", "BF16", (512,), 1024),
        (f"{UP}.bias", "bf16", "config.json"),
        "which has weight",
        SchemeError,
    ),
    Case(
        "unknown name in a dense layer",
        with_tensor("model.layers.0.mlp.mix_proj.weight", "BF16", (4,), 8),
        ("model.layers.0.mlp.mix_proj.weight", "dense layer"),
        "the split table knows",
        SchemeError,
    ),
    Case(
        "experts in a dense layer",
        with_tensor("model.layers.1.mlp.experts.0.up_proj.weight", "BF16", (4,), 8),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "dense layer"),
        "the split table knows",
        SchemeError,
    ),
]

_CONFIGS = [
    Case(
        "config has fewer dense layers",
        config(first_k_dense_replace=1),
        ("config.json", "first_k_dense_replace = 1", "gives 0,", "the names give 0-1", "only in the names: 1"),
        "give the config that belongs to the weights|config.json that belongs to",
    ),
    Case(
        "config has more dense layers",
        config(first_k_dense_replace=3),
        ("config.json", "first_k_dense_replace = 3", "gives 0-2", "the names give 0-1", "only in config.json: 2"),
        "give the config that belongs to the weights|config.json that belongs to",
    ),
    Case("no dense layer", _only_experts, ("no dense layer", "config.json", "first_k_dense_replace = 0"), "is named"),
    Case(
        "config of another hidden size",
        config(hidden_size=128),
        (f"{GATE}.weight", "config.json", "[512, 256]", "[512, 128]", "hidden_size 128"),
        "belongs to",
    ),
    Case(
        "config of another intermediate size",
        config(intermediate_size=1024),
        (f"{GATE}.weight", "config.json", "[512, 256]", "[1024, 256]", "intermediate_size 1024"),
        "belongs to",
    ),
    Case(
        "down stored transposed",
        tensors(_transposed_down),
        (f"{DOWN}.weight", "config.json", "[512, 256]", "[256, 512]"),
        "belongs to",
    ),
    Case(
        "description contradicts a type",
        with_tensor(f"{UP}.weight", "BF16", (512, 256), 262144),
        (f"{UP}.weight", DESCRIPTION, "W8A8_DYNAMIC", "is BF16", "I8"),
        "belongs to|again",
        SchemeError,
        SLIM,
    ),
    Case(
        "description lacks a tensor",
        described(**{f"{UP}.weight_scale": None}),
        (f"{UP}.weight_scale", DESCRIPTION),
        "of this checkpoint?",
        spec=SLIM,
    ),
    Case(
        "description names a tensor that no file has",
        without(f"{UP}.weight_offset"),
        (f"{UP}.weight_offset", DESCRIPTION, "W8A8_DYNAMIC", "no file"),
        AGAIN,
        spec=SLIM,
    ),
    Case(
        "description gives one linear two types",
        described(**{f"{UP}.weight_offset": "FLOAT"}),
        (UP, DESCRIPTION, "W8A8_DYNAMIC", "weight_offset FLOAT"),
        AGAIN,
        spec=SLIM,
    ),
    Case(
        "description of another type than text",
        described(**{f"{UP}.weight": 8}),
        (f"{UP}.weight", DESCRIPTION),
        "of this checkpoint?",
        spec=SLIM,
    ),
    Case(
        "description not JSON", written(DESCRIPTION, b"{"), (DESCRIPTION, "JSON"), AGAIN, spec=SLIM
    ),
    Case(
        "two descriptions",
        written("quant_model_description_w8a8.json", b"{}"),
        (DESCRIPTION, "quant_model_description_w8a8.json"),
        "keep the one",
        spec=SLIM,
    ),
]

_QUANTISATIONS = [
    Case(
        "unknown ModelSlim type",
        edited_json(DESCRIPTION, lambda types: types.update({n: "W4A8_DYNAMIC" for n in types if ".mlp." in n})),
        (GATE, DESCRIPTION, "W4A8_DYNAMIC"),
        "it knows",
        SchemeError,
        SLIM,
    ),
    Case(
        "unknown quant_method",
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        ("config.json", "quant_method", "'awq'"),
        "it knows fp8, compressed-tensors",
        SchemeError,
    ),
    Case(
        "no quant_method",
        config(quantization_config={"bits": 4}),
        ("config.json", "quant_method", "None"),
        "it knows fp8, compressed-tensors",
        SchemeError,
    ),
    Case(
        "quantization_config is no object",
        config(quantization_config=["fp8"]),
        ("config.json", "quantization_config", "list"),
        "an object is wanted",
    ),
    Case(
        "W4A16 of compressed-tensors",
        _int4,
        (GATE, "config.json", "int4 group symmetric"),
        "it knows",
        SchemeError,
        Spec("ct_dynamic"),
    ),
    Case(
        "W8A8 of compressed-tensors with asymmetric weights",
        config(quantization_config=_compressed("int", "channel", dynamic=True) | {}),
        (GATE, "config.json"),
        "it knows",
        SchemeError,
        Spec("ct_dynamic"),
    ),
    Case(
        "fp8 with one scale per tensor",
        config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        (GATE, "config.json", "weight_block_size"),
        "it knows",
        SchemeError,
        FP8,
    ),
    Case(
        "fp8 with static activations",
        config(
            quantization_config={
                "quant_method": "fp8",
                "activation_scheme": "static",
                "weight_block_size": [128, 128],
            }
        ),
        (GATE, "config.json", "activation_scheme static"),
        "it knows",
        SchemeError,
        FP8,
    ),
    Case(
        "quantised and no config",
        _no_config,
        (GATE, "weight_scale_inv", "config.json"),
        "put the model's own beside the files",
        spec=FP8,
    ),
]

_CUTS = [
    Case("tp 0", lambda folder: None, ("tp 0",), "use a tp from 1", AlignmentError, tp_size=0),
    Case("tp greater than I", lambda folder: None, ("tp 513", "512"), "use at most 512", AlignmentError, tp_size=513),
    Case(
        "I not divisible",
        lambda folder: None,
        (f"{GATE}.weight", "512", "tp 3", "1, 2, 4, 8, 16", "--pad"),
        "use a tp of",
        AlignmentError,
        tp_size=3,
    ),
    Case(
        "share off the block grid",
        lambda folder: None,
        (f"{GATE}.weight", "dim 0 = 1152", "tp 2", "576 rows", "128-row", "1, 3, 9;", "--pad", "--weights bf16"),
        "use a tp of",
        AlignmentError,
        Spec("fp8_block", intermediate=1152),
    ),
    Case(
        "I itself off the block grid",
        lambda folder: None,
        (f"{GATE}.weight", "dim 0 = 576", "tp 2", "288 rows", "128-row", "--weights bf16"),
        "use --pad",
        AlignmentError,
        Spec("fp8_block", intermediate=576),
    ),
    Case(
        "gate and up of different input_scale",
        _unequal_scales,
        (f"{GATE}.input_scale is 2,", f"{UP}.input_scale is 3;"),
        "use --layout separate",
        SchemeError,
        Spec("modelslim_static"),
    ),
]

_SETS = [
    Case("set without a manifest", removed("manifest.json"), ("set", "manifest.json", "incomplete"), "--resume", ManifestError),
    Case("set without a shard", removed(RANK_1), (RANK_1, "manifest.json", "missing"), "copy the whole set"),
    Case("set with a shard cut short", resized(RANK_1, -8), (RANK_1, "manifest.json"), AGAIN),
    Case("set with a changed shard", _flipped(RANK_1, -1), (RANK_1, "BLAKE3", "manifest.json", "damaged"), AGAIN),
    Case(
        "set of another version",
        edited_json("manifest.json", lambda m: m.update(schema="denseffn-shards/2")),
        ("manifest.json", "'denseffn-shards/2'", "'denseffn-shards/1'"),
        "use the reshard that wrote it",
        ManifestError,
    ),
    Case(
        "set with an unknown field",
        edited_json("manifest.json", lambda m: m["shards"][1].update(colour="red")),
        ("manifest.json", "shards.1.colour", "red"),
        "again|use the reshard that wrote it",
        ManifestError,
    ),
    Case(
        "set with an entry missing",
        edited_json("manifest.json", lambda m: m["shards"].pop()),
        ("manifest.json", "[0]", "tp_size 2"),
        "again|use the reshard that wrote it",
        ManifestError,
    ),
    Case("manifest not JSON", written("manifest.json", b"{"), ("manifest.json", "JSON"), AGAIN, ManifestError),
    Case("set without a side file", removed("config.json"), ("config.json", "manifest.json", "missing"), "copy the whole set"),
    Case("set with a longer side file", resized("config.json", 1), ("config.json", "manifest.json"), AGAIN),
    Case(
        "set with a changed side file",
        lambda folder: write(
            folder / "config.json", (folder / "config.json").read_bytes().replace(b"deepseek_v3", b"deepseek_v2")
        ),
        ("config.json", "manifest.json"),
        AGAIN,
    ),
    Case(
        "set with a tensor renamed in a shard",
        lambda folder: write(folder / RANK_1, (folder / RANK_1).read_bytes().replace(b"layers.0.mlp", b"layers.7.mlp")),
        (RANK_1, "model.layers.0.mlp.down_proj.weight", "manifest.json"),
        AGAIN,
    ),
]

CASES = [*_NAMES, *_CONFIGS, *_QUANTISATIONS, *_CUTS, *_SETS]
