"""Tensors inside a dense layer that no scheme has: what they are, and what to do."""

import re

_KNOWN = (
    (
        r"\.(?:input|weight|output)_quantizer\.",
        "ModelOpt's simulated quantization (amax of QAT or PTQ): weights that are not exported yet; export them with "
        "ModelOpt's export_hf_checkpoint and cut what it writes",
    ),
    (
        r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state)",
        "bitsandbytes' 4 bits, which this version does not split; cut the BF16 original",
    ),
)


def unknown_tensor(name: str) -> str:
    """A line on a tensor that stands in a dense layer and is no tensor that the split table knows."""
    what = next((what for pattern, what in _KNOWN if re.search(pattern, name)), None)
    line = f"{name}: stands in a dense layer and is no tensor that the split table knows"
    return f"{line}: {what}" if what else line
