"""NVIDIA ModelOpt's account, in hf_quant_config.json or in config.json with `quant_method: modelopt`."""

from typing import Any

from reshard.quantization.names import names_of
from reshard.quantization.section import Section
from reshard.schemes import FLOAT, QuantSpec

FILE = "hf_quant_config.json"

FP8_PB_WO = "FP8_PB_WO (FP8 in blocks of 128 x 128)"
"""Weights alone by its name; vLLM quantizes the activations, too (its modelopt.py), as fp8_block does."""

# By `quant_algo`, as ModelOpt names them and vLLM reads them.
_KINDS = {
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel",
    "FP8": "FP8 with one scale per tensor",
    "FP8_PB_WO": FP8_PB_WO,
}
_MIXED = "MIXED_PRECISION"


def declared_by_modelopt(section: Section, module: str) -> QuantSpec | None:
    """What `quant_algo` makes of a module that is not excluded. None: it is mixed, and the module's is not said."""
    algorithm = section.values.get("quant_algo")
    if algorithm == _MIXED:
        layers = section.objects("quantized_layers")
        if not layers:
            return None
        entry: Any = next((layers[name] for name in names_of(module) if name in layers), None)
        if entry is None:
            return QuantSpec(FLOAT, None, section.says("not in quantized_layers"))
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else entry
    if algorithm is None:
        return QuantSpec(FLOAT, None, section.says("quant_algo null"))
    name = str(algorithm).upper()
    return QuantSpec(_KINDS.get(name, name), None, section.says(f"quant_algo {algorithm}"))
