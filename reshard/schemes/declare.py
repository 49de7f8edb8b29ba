"""How a tool's files say that a linear is of a variant: what `reshard.quantization` reads, written."""

from collections.abc import Sequence
from typing import Any

from reshard.schemes.table import BLOCK, Operand, Variant

COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"


def description_type(variant: Variant) -> str | None:
    """The type in ModelSlim's description; None of a variant that a config declares, or that nothing need declare."""
    return variant.kind if not variant.said and len(variant.tensors) > 1 else None


def quantization_config(variant: Variant, targets: Sequence[str], ignore: Sequence[str]) -> dict[str, Any] | None:
    """config.json's section, None of a variant that no config declares.

    targets, ignore: modules, as compressed-tensors lists them; the other methods are of every linear.
    """
    if not variant.said:
        return None
    method, *words = variant.said[0].split()
    if method == COMPRESSED_TENSORS:
        return _compressed_tensors(words, targets, ignore)
    if method == "fp8":
        scales, activations = words
        blocks = {"weight_block_size": list(BLOCK)} if scales == "block" else {}
        scale = next(rule for rule in variant.tensors if rule.operand is Operand.SCALE)
        exponents = {"scale_fmt": "ue8m0"} if scale.dtypes[0] == "F8_E8M0" else {}
        return {"activation_scheme": activations, "fmt": "e4m3", "quant_method": method, **exponents, **blocks}
    return {"activation_scheme": "dynamic", "quant_method": method, "weight_block_size": list(BLOCK)}


def _compressed_tensors(words: Sequence[str], targets: Sequence[str], ignore: Sequence[str]) -> dict[str, Any]:
    number, strategy, activations, *asymmetric = words
    dynamic, kind = activations == "dynamic", number.removesuffix("8")
    inputs = {"block": "group", "channel": "token" if dynamic else "tensor", "tensor": "tensor"}[strategy]
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group: dict[str, Any] = {
        "targets": list(targets),
        "weights": {**common, "strategy": strategy, "dynamic": False},
        "input_activations": {**common, "symmetric": not asymmetric, "strategy": inputs, "dynamic": dynamic},
        "output_activations": None,
        "format": f"{kind}-quantized",
    }
    if strategy == "block":
        group["weights"] |= {"block_structure": list(BLOCK)}
        group["input_activations"] |= {"group_size": BLOCK[1]}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }
