"""Bad contents: checkpoints whose names, sizes, config.json and description contradict one another."""

import copy
import shutil
from math import prod
from pathlib import Path

from reshard.errors import LayersError, SchemeError, ShapesError
from tests.support.builders import RECIPES, Raw, Spec, build
from tests.support.corrupt import (
    AGAIN,
    DESCRIPTION,
    DOWN,
    GATE,
    OTHER_FILE,
    UP,
    Case,
    both,
    config,
    described,
    edited_json,
    tensors,
    with_tensor,
    without,
    written,
)

SLIM, FP8 = Spec("modelslim_dynamic"), Spec("fp8_block")


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
                count = prod(made)
                every[name.removesuffix("weight") + suffix] = (kind, made, bytes(count * size))

    tensors(change)(folder)
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
        "input_activations": None,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    config(quantization_config=quantization)(folder)


def _asymmetric_weights(folder: Path) -> None:
    quantization = copy.deepcopy(RECIPES["ct_dynamic"].quantization_config)
    assert quantization is not None
    quantization["config_groups"]["group_0"]["weights"]["symmetric"] = False
    config(quantization_config=quantization)(folder)


def _only_experts(folder: Path) -> None:
    shutil.rmtree(folder)
    build(folder, Spec(dense=0))


def _two_descriptions(folder: Path) -> None:
    (folder / DESCRIPTION).rename(folder / "quant_model_description_w8a8_dynamic.json")
    (folder / "quant_model_description_w8a8.json").write_text("{}")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


_NAMES = [
    Case(
        "gate without up", without(f"{UP}.weight"), (f"{UP}.weight", "missing", "gate_proj.weight"), AGAIN, LayersError
    ),
    Case(
        "up without gate",
        without(f"{GATE}.weight"),
        (f"{GATE}.weight", "missing", "up_proj.weight"),
        AGAIN,
        LayersError,
    ),
    Case("no down", without(f"{DOWN}.weight"), (f"{DOWN}.weight", "missing", "up_proj.weight"), AGAIN, LayersError),
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
        LayersError,
        Spec("ct_dynamic"),
    ),
    Case(
        "channel scale of a wrong shape",
        with_tensor(f"{UP}.weight_scale", "F32", (511, 1), 2044),
        (f"{UP}.weight_scale", "[511, 1]", "[512, 256]", "[512, 1]"),
        "not of one checkpoint",
        SchemeError,
        SLIM,
    ),
    Case(
        "block scale of a wrong shape",
        with_tensor(f"{UP}.weight_scale_inv", "F32", (4, 3), 48),
        (f"{UP}.weight_scale_inv", "[4, 3]", "[512, 256]", "[4, 2]", "128 x 128"),
        "not of one checkpoint",
        SchemeError,
        FP8,
    ),
    Case(
        "weight of three dimensions",
        with_tensor(f"{UP}.weight", "BF16", (512, 256, 1), 262144),
        (f"{UP}.weight", "[512, 256, 1]"),
        "expected a matrix [out, in]",
        SchemeError,
    ),
    Case(
        "gate and up of different shapes",
        both(with_tensor(f"{UP}.weight", "BF16", (256, 256), 131072), _no_config),
        (f"{UP}.weight", f"{GATE}.weight", "[256, 256]", "[512, 256]"),
        OTHER_FILE,
        ShapesError,
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
        "the table of schemes knows",
        SchemeError,
    ),
    Case(
        "experts in a dense layer",
        with_tensor("model.layers.1.mlp.experts.0.up_proj.weight", "BF16", (4,), 8),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "dense layer"),
        "the table of schemes knows",
        SchemeError,
    ),
]

_CONFIGS = [
    Case(
        "config has fewer dense layers",
        config(first_k_dense_replace=1),
        ("config.json", "first_k_dense_replace = 1", "gives 0,", "the names give 0-1", "only in the names: 1"),
        OTHER_FILE,
        LayersError,
    ),
    Case(
        "config has more dense layers",
        config(first_k_dense_replace=3),
        ("config.json", "first_k_dense_replace = 3", "gives 0-2", "the names give 0-1", "only in config.json: 2"),
        OTHER_FILE,
        LayersError,
    ),
    Case(
        "no dense layer",
        _only_experts,
        ("no dense layer", "config.json", "first_k_dense_replace = 0"),
        "is named",
        LayersError,
    ),
    Case(
        "config of another hidden size",
        config(hidden_size=128),
        (f"{GATE}.weight", "config.json", "[512, 256]", "[512, 128]", "hidden_size 128"),
        OTHER_FILE,
        ShapesError,
    ),
    Case(
        "config of another intermediate size",
        config(intermediate_size=1024),
        (f"{GATE}.weight", "config.json", "[512, 256]", "[1024, 256]", "intermediate_size 1024"),
        OTHER_FILE,
        ShapesError,
    ),
    Case(
        "down stored transposed",
        tensors(_transposed_down),
        (f"{DOWN}.weight", "config.json", "[512, 256]", "[256, 512]"),
        OTHER_FILE,
        ShapesError,
    ),
    Case(
        "description contradicts a type",
        with_tensor(f"{UP}.weight", "BF16", (512, 256), 262144),
        (f"{UP}.weight", DESCRIPTION, "W8A8_DYNAMIC", "is BF16", "I8"),
        "not of one checkpoint",
        SchemeError,
        SLIM,
    ),
    Case(
        "description lacks a weight",
        described(**{f"{UP}.weight": None}),
        (f"{UP}.weight", DESCRIPTION),
        "give the one of these weights",
        SchemeError,
        SLIM,
    ),
    Case(
        "description names a tensor that no file has",
        without(f"{UP}.weight_offset"),
        (f"{UP}.weight_offset", DESCRIPTION, "W8A8_DYNAMIC", "missing"),
        AGAIN,
        SchemeError,
        SLIM,
    ),
    Case(
        "description gives one linear two types",
        described(**{f"{UP}.weight_offset": "FLOAT"}),
        (UP, DESCRIPTION, "W8A8_DYNAMIC", "weight_offset FLOAT"),
        OTHER_FILE,
        spec=SLIM,
    ),
    Case(
        "description of another type than text",
        described(**{f"{UP}.weight": 8}),
        (f"{UP}.weight", DESCRIPTION),
        "of this checkpoint?",
        spec=SLIM,
    ),
    Case("description not JSON", written(DESCRIPTION, b"{"), (DESCRIPTION, "JSON"), AGAIN, spec=SLIM),
    Case(
        "two descriptions of other names",
        _two_descriptions,
        ("quant_model_description_w8a8.json", "quant_model_description_w8a8_dynamic.json"),
        "move the one that is not of these weights",
        spec=SLIM,
    ),
]

_QUANTIZATIONS = [
    Case(
        "unknown ModelSlim type",
        edited_json(DESCRIPTION, lambda types: types.update({n: "W4A8_DYNAMIC" for n in types if ".mlp." in n})),
        (GATE, DESCRIPTION, "W4A8_DYNAMIC"),
        "it splits",
        SchemeError,
        SLIM,
    ),
    Case(
        "unknown quant_method",
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        (f"{GATE}.weight", "config.json", "quant_method awq", "plain BF16"),
        "remove quantization_config from config.json",
        SchemeError,
    ),
    Case(
        "no quant_method",
        config(quantization_config={"bits": 4}),
        (f"{GATE}.weight", "config.json", "quant_method None", "plain BF16"),
        "remove quantization_config from config.json",
        SchemeError,
    ),
    Case(
        "quantization_config is no object",
        config(quantization_config=["fp8"]),
        ("config.json", "quantization_config", "list"),
        "expected an object",
    ),
    Case(
        "W4A16 of compressed-tensors",
        _int4,
        (GATE, "config.json", "int4 group symmetric"),
        "it splits",
        SchemeError,
        Spec("ct_dynamic"),
    ),
    Case(
        "W8A8 of compressed-tensors with asymmetric weights",
        _asymmetric_weights,
        (GATE, "config.json", "int8 channel asymmetric"),
        "it splits",
        SchemeError,
        Spec("ct_dynamic"),
    ),
    Case(
        "fp8 with one scale per tensor",
        config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        (GATE, "config.json", "weight_block_size", "fp8_block"),
        "--scheme fp8_block",
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
        "it splits",
        SchemeError,
        FP8,
    ),
    Case(
        "quantized and no config",
        _no_config,
        (GATE, "weight_scale_inv", "config.json"),
        "put the model's own config.json beside the files",
        SchemeError,
        FP8,
    ),
]

CASES = [*_NAMES, *_CONFIGS, *_QUANTIZATIONS]
