"""Checkpoints as the tools write them, made without any of reshard's code: raw headers, raw bytes.

A tensor is (dtype, shape, bytes). `build` writes a folder and returns every tensor in it by name.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tests.support.paths import DATA

Raw = tuple[str, tuple[int, ...], bytes]
CHECKPOINTS = DATA / "checkpoints"
REAL = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


def write_safetensors(path: Path, tensors: dict[str, Raw], metadata: dict[str, str] | None = None) -> None:
    """A file with its tensors in the given order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def read_safetensors(path: Path) -> dict[str, Raw]:
    """Every tensor of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_folder(folder: Path, pattern: str = "*.safetensors") -> dict[str, Raw]:
    """Every tensor of a folder's files."""
    found: dict[str, Raw] = {}
    for path in sorted(folder.glob(pattern)):
        found |= read_safetensors(path)
    return found


_T = TypeVar("_T")


def dense_only(tensors: dict[str, _T]) -> dict[str, _T]:
    """The DenseFFN tensors of the checkpoints made here: `mlp.{gate,up,down}_proj` directly below a layer."""
    return {n: t for n, t in tensors.items() if n.split(".")[3:4] == ["mlp"] and n.split(".")[4] in _ROLES}


_ROLES = ("gate_proj", "up_proj", "down_proj")
_SIZES = {"I8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


def random_raw(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], scale: bool = False) -> Raw:
    """Random bits for a weight, small positive values for a scale; no NaN, no infinity."""
    if scale:
        values = rng.uniform(1e-3, 1e-2, shape)
        if dtype in _EXPONENTS:
            return dtype, shape, _exponents(values)
        if dtype == "BF16":
            data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        elif dtype == "I64":
            data = values.astype(np.float32).view(np.int32).astype(np.int64).tobytes()
        else:
            data = values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()
        return dtype, shape, data
    if dtype in {"BF16", "F16", "F32"}:
        values = rng.standard_normal(shape).astype(np.float32)
        if dtype == "BF16":
            return dtype, shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return dtype, shape, values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 256, shape, dtype=np.uint8)
        codes[(codes & 127) == 127] = 0
        return dtype, shape, codes.tobytes()
    kind = {"I8": np.int8, "I32": np.int32}[dtype]
    bounds = np.iinfo(np.int8)
    return dtype, shape, rng.integers(bounds.min, bounds.max, shape, dtype=kind, endpoint=True).tobytes()


_EXPONENTS = {"U8", "F8_E8M0"}


def _exponents(values: np.ndarray[Any, Any]) -> bytes:
    """The nearest powers of 2, as exponents biased by 127."""
    return np.rint(np.log2(values) + 127).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Recipe:
    """How a tool writes one kind of linear. Tensors: suffix -> (dtype, shape rule)."""

    scheme: str
    tensors: dict[str, tuple[str, str]]
    description: str | None = None
    quantization_config: dict[str, Any] | None = None
    description_file: str = "quant_model_description.json"
    index_file: str = "model.safetensors.index.json"


def _compressed(kind: str, strategy: str, dynamic: bool, symmetric: bool = True, **weights: Any) -> dict[str, Any]:
    inputs = "token" if dynamic else "tensor"
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights},
        "input_activations": {
            "num_bits": 8,
            "type": kind,
            "strategy": "group" if strategy == "block" else inputs,
            "symmetric": symmetric,
            "dynamic": dynamic,
        },
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_STATIC = {
    "weight": ("I8", "out,in"),
    "input_scale": ("BF16", "1"),
    "input_offset": ("BF16", "1"),
    "quant_bias": ("I32", "out"),
    "deq_scale": ("F32", "out"),
}
_CHANNEL = {"weight_scale": ("F32", "out,1"), "weight_offset": ("F32", "out,1")}
_SLIM: dict[str, Any] = {"index_file": "quant_model_weights.safetensors.index.json"}
_BLOCK_SIZE = [128, 128]

RECIPES = {
    "bf16": Recipe("bf16", {"weight": ("BF16", "out,in")}),
    "fp16": Recipe("bf16", {"weight": ("F16", "out,in")}),
    "fp32": Recipe("bf16", {"weight": ("F32", "out,in")}),
    "modelslim_float": Recipe("bf16", {"weight": ("BF16", "out,in")}, "FLOAT", **_SLIM),
    "modelslim_dynamic": Recipe("w8a8_dynamic", {"weight": ("I8", "out,in"), **_CHANNEL}, "W8A8_DYNAMIC", **_SLIM),
    "modelslim_v0_dynamic": Recipe(
        "w8a8_dynamic",
        {"weight": ("I8", "out,in"), "weight_scale": ("BF16", "out,1"), "weight_offset": ("BF16", "out,1")},
        "W8A8_DYNAMIC",
        index_file="quant_model_weight_w8a8_dynamic.safetensors.index.json",
    ),
    "modelslim_static": Recipe("w8a8_static", _STATIC, "W8A8", **_SLIM),
    "modelslim_v0_static": Recipe("w8a8_static", {**_STATIC, **_CHANNEL}, "W8A8", **_SLIM),
    "modelslim_fp16_static": Recipe(
        "w8a8_static",
        {**_STATIC, "input_scale": ("F16", "1"), "input_offset": ("F16", "1"), "deq_scale": ("I64", "out")},
        "W8A8",
        **_SLIM,
    ),
    "modelslim_mix": Recipe("w8a8_mix", {**_STATIC, **_CHANNEL}, "W8A8_MIX", **_SLIM),
    "mindie": Recipe(
        "w8a8_dynamic",
        {"weight": ("I8", "out,in"), **_CHANNEL},
        "W8A8_DYNAMIC",
        {"quant_method": "stub"},
        "quant_model_description_w8a8_dynamic.json",
        "quant_model_weight_w8a8_dynamic.safetensors.index.json",
    ),
    "ct_dynamic": Recipe(
        "w8a8_dynamic",
        {"weight": ("I8", "out,in"), "weight_scale": ("BF16", "out,1")},
        quantization_config=_compressed("int", "channel", dynamic=True),
    ),
    "ct_static": Recipe(
        "w8a8_static",
        {"weight": ("I8", "out,in"), "weight_scale": ("BF16", "out,1"), "input_scale": ("BF16", "1")},
        quantization_config=_compressed("int", "channel", dynamic=False),
    ),
    "ct_static_asymmetric": Recipe(
        "w8a8_static",
        {
            "weight": ("I8", "out,in"),
            "weight_scale": ("BF16", "out,1"),
            "input_scale": ("BF16", "1"),
            "input_zero_point": ("I8", "1"),
        },
        quantization_config=_compressed("int", "channel", dynamic=False, symmetric=False),
    ),
    "fp8_block": Recipe(
        "fp8_block",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale_inv": ("F32", "blocks")},
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": _BLOCK_SIZE,
        },
    ),
    "ct_fp8_block": Recipe(
        "fp8_block",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("BF16", "blocks")},
        quantization_config=_compressed("float", "block", dynamic=True, block_structure=_BLOCK_SIZE),
    ),
    "ct_fp8_channel": Recipe(
        "fp8_channel",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("BF16", "out,1")},
        quantization_config=_compressed("float", "channel", dynamic=True),
    ),
    "fp8_block_ue8m0": Recipe(
        "fp8_block",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale_inv": ("F8_E8M0", "blocks")},
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": _BLOCK_SIZE,
        },
    ),
    "fp8_tensor": Recipe(
        "fp8_tensor",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("F32", "1")},
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"},
    ),
    "fp8_tensor_static": Recipe(
        "fp8_tensor",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("F32", "1"), "input_scale": ("F32", "1")},
        quantization_config={"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "ct_fp8_tensor": Recipe(
        "fp8_tensor",
        {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("BF16", "1"), "input_scale": ("BF16", "1")},
        quantization_config=_compressed("float", "tensor", dynamic=False),
    ),
    "modelslim_mxfp8": Recipe(
        "w8a8_mxfp8", {"weight": ("F8_E4M3", "out,in"), "weight_scale": ("U8", "groups")}, "W8A8_MXFP8", **_SLIM
    ),
    "int8_block": Recipe(
        "int8_block",
        {"weight": ("I8", "out,in"), "weight_scale_inv": ("F32", "blocks")},
        quantization_config={
            "quant_method": "blockwise_int8",
            "activation_scheme": "dynamic",
            "weight_block_size": _BLOCK_SIZE,
        },
    ),
}


def _encode(dtype: str, values: np.ndarray[Any, Any]) -> bytes:
    """Values as stored; BF16 by truncation."""
    single = values.astype(np.float32)
    if dtype in _EXPONENTS:
        return _exponents(single)
    if dtype == "BF16":
        return (single.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    if dtype == "I64":
        return single.view(np.int32).astype(np.int64).tobytes()
    kinds = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "I32": np.int32}
    return np.asarray(values).astype(kinds[dtype]).tobytes()


def _computable(rng: np.random.Generator, recipe: Recipe, module: str, found: dict[str, Raw]) -> dict[str, Raw]:
    """The linear with values that fit together: weights of about 1 / sqrt(in), as in a model that runs.

    Offsets of weights are 0; deq_scale = input_scale * weight_scale, quant_bias = -sum(weight * input_offset).
    """
    weight_dtype, (out, in_), raw = found[f"{module}.weight"]
    size = in_**-0.5
    if weight_dtype in {"BF16", "F16", "F32"}:
        return {
            f"{module}.weight": (
                weight_dtype,
                (out, in_),
                _encode(weight_dtype, rng.standard_normal((out, in_)) * size),
            )
        }
    of: dict[str, np.ndarray[Any, Any]] = {}
    stored = np.frombuffer(raw, np.int8).reshape(out, in_)  # of F8 its codes, which are not read here
    spread = 74.0 if weight_dtype == "I8" else 100.0  # the standard deviation of evenly dealt codes
    scales = (1 + 0.5 * rng.random(out)) * size / spread
    of["weight_scale"] = scales
    of["weight_offset"] = np.zeros(out)
    step = 2.0**-4 if module.endswith("down_proj") else 2.0**-5  # h has longer tails than tokens
    of["input_scale"] = np.array([step])
    of["input_offset"] = of["input_zero_point"] = np.array([-7.0])
    of["quant_bias"] = 7 * stored.astype(np.int64).sum(axis=1)
    of["deq_scale"] = np.float32(step) * scales.astype(np.float32)
    grids = {"blocks": (-(-out // 128), -(-in_ // 128)), "groups": (out, -(-in_ // 32)), "1": (1,)}
    for suffix in ("weight_scale", "weight_scale_inv"):
        grid = grids.get(recipe.tensors.get(suffix, ("", ""))[1])
        if grid is not None:
            of[suffix] = (1 + 0.5 * rng.random(grid)) * size / spread
    for name, (dtype, shape, _) in found.items():
        suffix = name.rsplit(".", 1)[1]
        if suffix != "weight":
            found[name] = (dtype, shape, _encode(dtype, of[suffix]))
    return found


def linear(
    rng: np.random.Generator, recipe: Recipe, module: str, out: int, in_: int, computable: bool = False
) -> dict[str, Raw]:
    """The tensors of one linear."""
    shapes = {
        "out,in": (out, in_),
        "out,1": (out, 1),
        "out": (out,),
        "1": (1,),
        "blocks": (-(-out // 128), -(-in_ // 128)),
        "groups": (out, -(-in_ // 32)),
    }
    found = {
        f"{module}.{suffix}": random_raw(rng, dtype, shapes[rule], scale="scale" in suffix)
        for suffix, (dtype, rule) in recipe.tensors.items()
    }
    return _computable(rng, recipe, module, found) if computable else found


@dataclass
class Spec:
    """A small checkpoint: `dense` dense layers, then one MoE layer and an MTP layer that must stay whole."""

    recipe: str = "bf16"
    hidden: int = 256
    intermediate: int = 512
    dense: int = 2
    files: int = 2
    seed: int = 0
    index: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    down_recipe: str | None = None  # where down is quantized in another way
    computable: bool = False  # offsets of weights zero, weights of about 1 / sqrt(in): as of a model that runs


def tensors_of(spec: Spec) -> dict[str, Raw]:
    """Every tensor of the checkpoint, by name."""
    rng = np.random.default_rng(spec.seed)
    gate_up, down = RECIPES[spec.recipe], RECIPES[spec.down_recipe or spec.recipe]
    found: dict[str, Raw] = {"model.embed_tokens.weight": random_raw(rng, "BF16", (16, spec.hidden))}
    for layer in range(spec.dense):
        prefix = f"model.layers.{layer}.mlp"
        gate = linear(rng, gate_up, f"{prefix}.gate_proj", spec.intermediate, spec.hidden, spec.computable)
        up = linear(rng, gate_up, f"{prefix}.up_proj", spec.intermediate, spec.hidden, spec.computable)
        for suffix, (_, rule) in gate_up.tensors.items():
            if rule == "1":  # what the fused layout holds once
                up[f"{prefix}.up_proj.{suffix}"] = gate[f"{prefix}.gate_proj.{suffix}"]
        found |= gate | up | linear(rng, down, f"{prefix}.down_proj", spec.hidden, spec.intermediate, spec.computable)
        found[f"model.layers.{layer}.input_layernorm.weight"] = random_raw(rng, "BF16", (spec.hidden,))
    for layer in (spec.dense, spec.dense + 1):  # the second one is the MTP layer
        for module in ("experts.0", "shared_experts"):
            for role in _ROLES:
                name = f"model.layers.{layer}.mlp.{module}.{role}.weight"
                found[name] = random_raw(rng, "BF16", (8, 8))
        found[f"model.layers.{layer}.mlp.gate.weight"] = random_raw(rng, "BF16", (2, spec.hidden))
    return found


def config_of(spec: Spec) -> dict[str, Any]:
    """The config.json that goes with it."""
    config: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.dense + 1,
        "hidden_act": "silu",
        "first_k_dense_replace": spec.dense,
        "n_routed_experts": 1,
        "num_nextn_predict_layers": 1,
        "torch_dtype": "bfloat16",
    }
    quantization = RECIPES[spec.recipe].quantization_config
    if quantization is not None:
        config["quantization_config"] = quantization
    return config | spec.config


def description_of(spec: Spec, tensors: dict[str, Raw]) -> dict[str, Any] | None:
    """ModelSlim's description, if the recipe is ModelSlim's."""
    gate_up, down = RECIPES[spec.recipe], RECIPES[spec.down_recipe or spec.recipe]
    if gate_up.description is None:
        return None
    types: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0}
    dense = dense_only(tensors)
    for name in tensors:
        kind = (down if ".down_proj." in name else gate_up).description if name in dense else None
        types[name] = kind or "FLOAT"
    return types


def build(folder: Path, spec: Spec) -> dict[str, Raw]:
    """Write the checkpoint into a new folder. Returns its tensors."""
    folder.mkdir(parents=True)
    tensors, recipe = tensors_of(spec), RECIPES[spec.recipe]
    names = [f"model-{i + 1:05d}-of-{spec.files:05d}.safetensors" for i in range(spec.files)]
    holders = {name: names[i % spec.files] for i, name in enumerate(tensors)}
    for file in names:
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if holders[n] == file}, {"format": "pt"})
    if spec.index:
        index = {"metadata": {"total_size": sum(len(t[2]) for t in tensors.values())}, "weight_map": holders}
        (folder / recipe.index_file).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(spec)))
    description = description_of(spec, tensors)
    if description is not None:
        (folder / recipe.description_file).write_text(json.dumps(description))
    return tensors


def allowed_bytes(folder: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For each file, which bytes are its header's or a DenseFFN tensor's; of others, all."""
    allowed = {}
    for path in folder.iterdir():
        raw = path.read_bytes()
        mask = np.ones(len(raw), np.bool_)
        if path.suffix == ".safetensors":
            start = 8 + int.from_bytes(raw[:8], "little")
            mask[start:] = False
            header = json.loads(raw[8:start])
            header.pop("__metadata__", None)
            for name in dense_only(header):
                first, last = header[name]["data_offsets"]
                mask[start + first : start + last] = True
        allowed[path.name] = mask
    return allowed
