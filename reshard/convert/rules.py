"""What `--weights` makes of a checkpoint's linears: a new description, no values (reshard.convert.compute has those).

bf16  each block- or channel-scaled weight becomes weight * scale, rounded to BF16.
w8a8  each float weight becomes int8 with one scale per output channel over the full input dimension, symmetric:
      scale = max|w| / 127 or, where that is 0, 1; q = round(w / scale). As ModelSlim's W8A8_DYNAMIC (F32 scale, a
      zero offset) or as compressed-tensors has it (BF16 scale, no offset).

A linear that already is what is asked for stays as it is, bit for bit.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.checkpoint.description import Checkpoint, Conversion, Layer, Linear, Tensor
from reshard.errors import SchemeError
from reshard.model.naming import CONFIG, ROLES
from reshard.quantization import DESCRIPTION, without_quantization
from reshard.schemes import VARIANTS, Variant
from reshard.source.base import parse_json_object

KEEP, BF16, W8A8 = "keep", "bf16", "w8a8"
MODELSLIM, COMPRESSED_TENSORS = "modelslim", "compressed-tensors"

DEQUANTIZE, CAST, QUANTIZE = "dequantize_to_bf16", "cast_to_bf16", "quantize_to_int8_per_channel"

# Schemes whose values are weight * scale, with no quantized activations to go with them.
_WEIGHT_ONLY = frozenset({"bf16", "fp8_block", "fp8_channel", "int8_block"})


def converted(checkpoint: Checkpoint, weights: str, quant_format: str = MODELSLIM) -> Checkpoint:
    """The checkpoint with other weights. Raises SchemeError where a linear cannot become what is asked for."""
    if weights == KEEP:
        return checkpoint
    target = _target(weights, quant_format)
    layers = tuple(
        replace(layer, linears={role: _linear(layer.linears[role], f"{layer.module}.{role}", target) for role in ROLES})
        for layer in checkpoint.layers
    )
    if layers == checkpoint.layers:
        return checkpoint
    return replace(checkpoint, layers=layers, side_files=_side_files(checkpoint, layers, target))


def _target(weights: str, quant_format: str) -> Variant:
    kinds = {BF16: "FLOAT", W8A8: "W8A8_DYNAMIC" if quant_format == MODELSLIM else "int8-channel-dynamic"}
    return next(variant for variant in VARIANTS if variant.kind == kinds[weights])


def _linear(linear: Linear, module: str, target: Variant) -> Linear:
    scheme = linear.variant.scheme
    weight = linear.tensors["weight"]
    is_float = target.scheme == "bf16"
    if linear.variant == target and (not is_float or weight.dtype == "BF16"):
        return linear
    if weight.conversion is not None:
        raise SchemeError(
            f"{module}: was made by {weight.conversion.rule} already, and converting twice rounds twice; convert what "
            "it was made from"
        )
    if weight.whole is not None:
        raise SchemeError(
            f"{weight.name}: gate and up are stacked in the checkpoint, and what is converted would have names that it "
            "does not know; leave it at --weights keep"
        )
    if scheme not in _WEIGHT_ONLY:
        raise SchemeError(
            f"{module}: is {linear.variant.kind} ({scheme}), which does not become {target.kind}; --weights converts "
            f"{', '.join(sorted(_WEIGHT_ONLY))}: leave it at --weights keep"
        )
    rule = QUANTIZE if not is_float else CAST if scheme == "bf16" else DEQUANTIZE
    inputs = tuple(linear.tensors[tensor.suffix].name for tensor in linear.variant.tensors)
    conversion = Conversion(rule, inputs)
    out_features = weight.shape[0]
    forms = {
        "weight": ("BF16" if is_float else "I8", weight.shape),
        "weight_scale": ("F32" if target.kind == "W8A8_DYNAMIC" else "BF16", (out_features, 1)),
        "weight_offset": ("F32", (out_features, 1)),
    }
    tensors = {
        suffix: Tensor(f"{module}.{suffix}", *forms[suffix], (), conversion)
        for suffix in (rule.suffix for rule in target.tensors)
    }
    return Linear(target, None, tensors)


def _side_files(checkpoint: Checkpoint, layers: tuple[Layer, ...], target: Variant) -> dict[str, bytes]:
    """config.json and the description as they are true of the converted DenseFFN, which is all that a set holds.

    Every linear is of the target's kind now, or the conversion was refused.
    """
    files: dict[str, bytes] = {}
    raw = checkpoint.side_files.get(CONFIG)
    if raw is not None:
        config = without_quantization(parse_json_object(raw, CONFIG))
        for key in ("dtype", "torch_dtype"):
            if key in config and target.scheme == "bf16":
                config[key] = "bfloat16"
        if target.kind == "int8-channel-dynamic":
            config["quantization_config"] = _compressed_tensors(layers)
        files[CONFIG] = _json(config)
    elif target.kind == "int8-channel-dynamic":
        raise SchemeError(f"--quant-format {COMPRESSED_TENSORS} is told by {CONFIG}, which the source lacks")
    if target.kind == "W8A8_DYNAMIC":
        names = [tensor.name for layer in layers for tensor in layer.tensors()]
        files[DESCRIPTION] = _json(
            {"version": "1.0.0", "model_quant_type": target.kind} | dict.fromkeys(names, target.kind)
        )
    return files


def _compressed_tensors(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors' W8A8: int8 per channel, activations per token."""
    modules = "|".join(re.escape(layer.module) for layer in layers)
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": [rf"re:({modules})\.(gate|up|down)_proj$"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": "int-quantized",
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
