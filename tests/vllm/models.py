"""Small random DeepSeek-V3 models that vLLM's CPU build serves, written tensor by tensor; one inside Kimi K2.5.

Dense layers whose weights matter: those of the MLPs are five times as large as usual, so that a wrong one changes
what the model says. With `dense` = `layers`, all layers are dense and vLLM takes the model for a MoE one all the same.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from tests.support.manifests import edit_manifest

HIDDEN, INTERMEDIATE, EXPERT, VOCABULARY = 256, 512, 128, 512
_HEADS, _NOPE, _ROPE, _V, _KV = 4, 128, 64, 128, 512
_EXPERTS = 8
_MLP = 5.0
_TOWER, _GRID = 128, 8  # a vision tower's sizes
_FFN, _REST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def attention_backend() -> str | None:
    """vLLM's own on a CPU without AMX; the one that it takes on others has no float32."""
    return None if "VLLM_MLA_DISABLE" in os.environ else "CPU_MLA"


def config(layers: int, dense: int, dtype: str) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": dtype,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": EXPERT,
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": _KV,
        "qk_nope_head_dim": _NOPE,
        "qk_rope_head_dim": _ROPE,
        "v_head_dim": _V,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_model(
    folder: Path,
    *,
    layers: int = 3,
    dense: int = 3,
    dtype: str = "float32",
    seed: int = 0,
    intermediate: int = INTERMEDIATE,
    vocabulary: int = VOCABULARY,
) -> Path:
    """The model's folder: one file of dense layers, one of the rest."""
    ffn, rest = _tensors(layers, dense, getattr(torch, dtype), seed, intermediate, vocabulary)
    sizes = {"intermediate_size": intermediate, "vocab_size": vocabulary}
    return _write(folder, config(layers, dense, dtype) | sizes, ffn, rest)


def write_kimi_k25(folder: Path, *, layers: int = 3, dense: int = 3) -> Path:
    """The same model as Kimi K2.5 has it, float32: under a prefix and text_config, beside a vision tower of a layer."""
    ffn, rest = _tensors(layers, dense, torch.float32, 0, INTERMEDIATE)
    text = config(layers, dense, "float32") | {"model_type": "kimi_k2"}
    settings = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": {
            "model_type": "kimi_k25_vision",
            "hidden_size": _TOWER,
            "intermediate_size": _TOWER,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            **dict.fromkeys(("pos_emb_height", "pos_emb_width"), _GRID),
            # As vLLM 0.27's own config class, and the published file, have them.
            **dict.fromkeys(("init_pos_emb_height", "init_pos_emb_width"), _GRID),
            "mm_hidden_size": _TOWER,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    inside = [{f"language_model.{name}": value for name, value in tensors.items()} for tensors in (ffn, rest)]
    return _write(folder, settings, inside[0], inside[1] | _tower())


def parts(name: str, full: torch.Tensor, size: int) -> list[torch.Tensor]:
    """What each rank holds of a dense layer's parameter: a stacked gate_up by rows of each half, down by columns."""
    if "gate_up" not in name:
        return list(full.chunk(size, dim=1))
    return [torch.cat(halves) for halves in zip(*(half.chunk(size) for half in full.chunk(2)), strict=True)]


def of_parts(names: Collection[str], keys: Collection[str] = ("denseffn",)) -> set[str]:
    """The tensors of parts among those of models with `model.layers.{i}`, in which no other MLP is a layer's own."""
    return {name for name in names if any(re.fullmatch(_OF_PART[key], name) for key in keys)}


_OF_PART = {
    "denseffn": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\..+",
    "o_proj": r"model\.layers\.\d+\.self_attn\.o_proj\..+",
    "lm_head": r"lm_head\..+",
    "embedding": r"model\.embed_tokens\..+",
}


def poisoned(model: Path, folder: Path, keys: Collection[str] = ("denseffn",)) -> Path:
    """The same files with other bytes, NaN in floats, in every tensor of those parts: who reads one is found out."""
    folder.mkdir()
    for path in model.iterdir():
        raw = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            start = 8 + int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8:start])
            for name in of_parts(header, keys):
                first, end = (start + offset for offset in header[name]["data_offsets"])
                raw[first:end] = b"\xff" * (end - first)
        (folder / path.name).write_bytes(raw)
    return folder


def with_fp8_blocks(model: Path, folder: Path) -> Path:
    """A copy of a model whose layers are all dense, MLPs and o_proj in FP8 with a scale for each 128 x 128 block."""
    folder.mkdir()
    tensors = {name: value for path in model.glob("*.safetensors") for name, value in load_file(path).items()}
    scales, generator = {}, torch.Generator().manual_seed(2)
    for name in sorted(of_parts(tensors, ("denseffn", "o_proj"))):
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        scales[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    attention = [name.removesuffix(".weight") for name in tensors if "proj" in name and ".self_attn." in name]
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [name for name in attention if not name.endswith(".o_proj")],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def with_bf16_o_proj(model: Path, folder: Path) -> Path:
    """A copy of a model of `with_fp8_blocks` in which o_proj is multiplied out, and config.json says so."""
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith(".o_proj.weight")):
        scale = tensors.pop(f"{name}_scale_inv")
        factor = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        tensors[name] = (tensors[name].float() * factor).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"]["modules_to_not_convert"] += [
        name.removesuffix(".weight") for name in tensors if name.endswith(".o_proj.weight")
    ]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def with_int8_o_proj(model: Path, folder: Path) -> Path:
    """A copy of a model of llm-compressor's in which o_proj is quantized, too: as down is, which has its shape."""
    folder.mkdir()
    tensors = {name: value for path in model.glob("*.safetensors") for name, value in load_file(path).items()}
    kept = {name: value for name, value in tensors.items() if ".self_attn.o_proj." not in name}
    down = {name: value for name, value in kept.items() if ".mlp.down_proj." in name}
    copies = {name.replace(".mlp.down_proj.", ".self_attn.o_proj."): value.flip(0) for name, value in down.items()}
    save_file(kept | copies, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    quantization = settings["quantization_config"]
    quantization["ignore"] = [name for name in quantization["ignore"] if not name.endswith(".o_proj")]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _tensors(
    layers: int, dense: int, dtype: torch.dtype, seed: int, intermediate: int, vocabulary: int = VOCABULARY
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the dense layers' MLPs, everything else)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        value = torch.randn(shape, generator=generator) * scale / shape[-1] ** 0.5
        return value.to(dtype)

    def mlp(prefix: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.gate_proj.weight": random(size, HIDDEN, scale=_MLP),
            f"{prefix}.up_proj.weight": random(size, HIDDEN, scale=_MLP),
            f"{prefix}.down_proj.weight": random(HIDDEN, size, scale=_MLP),
        }

    one = torch.ones(HIDDEN, dtype=dtype)
    ffn: dict[str, torch.Tensor] = {}
    rest = {
        "model.embed_tokens.weight": random(vocabulary, HIDDEN, scale=HIDDEN**0.5),
        "model.norm.weight": one.clone(),
        "lm_head.weight": random(vocabulary, HIDDEN),
    }
    for index in range(layers):
        layer = f"model.layers.{index}"
        rest |= {
            f"{layer}.input_layernorm.weight": one.clone(),
            f"{layer}.post_attention_layernorm.weight": one.clone(),
            f"{layer}.self_attn.q_proj.weight": random(_HEADS * (_NOPE + _ROPE), HIDDEN),
            f"{layer}.self_attn.kv_a_proj_with_mqa.weight": random(_KV + _ROPE, HIDDEN),
            f"{layer}.self_attn.kv_a_layernorm.weight": torch.ones(_KV, dtype=dtype),
            f"{layer}.self_attn.kv_b_proj.weight": random(_HEADS * (_NOPE + _V), _KV),
            f"{layer}.self_attn.o_proj.weight": random(HIDDEN, _HEADS * _V),
        }
        if index < dense:
            ffn |= mlp(f"{layer}.mlp", intermediate)
            continue
        rest[f"{layer}.mlp.gate.weight"] = random(_EXPERTS, HIDDEN)
        rest[f"{layer}.mlp.gate.e_score_correction_bias"] = torch.zeros(_EXPERTS)
        rest |= mlp(f"{layer}.mlp.shared_experts", EXPERT)
        for expert in range(_EXPERTS):
            rest |= mlp(f"{layer}.mlp.experts.{expert}", EXPERT)
    return ffn, rest


def _tower() -> dict[str, torch.Tensor]:
    """Kimi K2.5's vision tower and projector, as its files name them."""
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "vision_tower.patch_embed.proj": (_TOWER, 3, 14, 14),
        "vision_tower.patch_embed.pos_emb": (_GRID, _GRID, _TOWER),
        "vision_tower.encoder.final_layernorm": (_TOWER,),
        "mm_projector.pre_norm": (_TOWER,),
        "mm_projector.proj.0": (4 * _TOWER, 4 * _TOWER),
        "mm_projector.proj.2": (HIDDEN, 4 * _TOWER),
    }
    block = {"norm0": (), "norm1": (), "wqkv": (_TOWER,), "wo": (_TOWER,), "mlp.fc0": (_TOWER,), "mlp.fc1": (_TOWER,)}
    for name, inputs in block.items():
        sizes[f"vision_tower.encoder.blocks.0.{name}"] = ((3 if name == "wqkv" else 1) * _TOWER, *inputs)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    biases = {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in sizes.items()}
    del biases["vision_tower.patch_embed.pos_emb.bias"]
    return tensors | biases


def _write(folder: Path, settings: dict[str, Any], ffn: dict[str, torch.Tensor], rest: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    files = {_FFN: ffn, _REST: rest}
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_llama(folder: Path, layers: int = 2, *, tied: bool = False) -> Path:
    """A random Llama: all its layers are dense, and none is DeepSeek's. tied: without an LM head of its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    if not tied:
        tensors["lm_head.weight"] = random(VOCABULARY, HIDDEN)
    for index in range(layers):
        layer = f"model.layers.{index}"
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
        tensors |= {f"{layer}.mlp.{name}_proj.weight": random(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = random(HIDDEN, INTERMEDIATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_activation(shards: Path, folder: Path, activation: dict[str, Any] | None) -> Path:
    """A copy of a set in `folder`, as cut from a model whose config.json says another activation, or is missing."""
    copied = Path(shutil.copytree(shards, folder / shards.name))
    path = copied / "config.json"
    config = json.loads(path.read_text())
    if activation is None:
        path.unlink()
        model, side_files = {"model_type": "", "num_hidden_layers": None}, []
    else:
        name, limit = activation["name"], activation["limit"]
        config["hidden_act"] = {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
        if limit is not None:  # of the models that have one
            config |= {"model_type": "glm5_next_text", "swiglu_limit": limit}
        raw = json.dumps(config).encode()
        path.write_bytes(raw)
        model = {"model_type": config["model_type"]}
        side_files = [{"name": path.name, "size": len(raw), "blake3": blake3(raw).hexdigest()}]

    def change(manifest: dict[str, Any]) -> None:
        assert [file["name"] for file in manifest["files"]] == [path.name]
        manifest["files"] = side_files
        manifest["model"].update(model)
        for layer in manifest["layers"]:
            assert layer["activation"] == {"name": "silu", "limit": None}
            layer["activation"] = activation

    edit_manifest(copied, change)
    return copied
