"""What `--weights` must make of a checkpoint: whole tensors, plain torch."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.builders import Raw, Spec, read_safetensors, write_safetensors

torch = pytest.importorskip("torch")

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,  # scales
    "I8": torch.int8,
}
CONVERTIBLE = ["bf16", "fp16", "fp32", "fp8_block", "fp8_block_ue8m0", "ct_fp8_block", "ct_fp8_channel", "fp8_tensor",
               "ct_fp8_tensor", "modelslim_mxfp8", "int8_block"]  # fmt: skip
FORMATS = ["modelslim", "compressed-tensors"]
TARGETS = [("bf16", "modelslim"), ("w8a8", "modelslim"), ("w8a8", "compressed-tensors")]


def to_torch(raw: Raw) -> Any:
    return torch.frombuffer(bytearray(raw[2]), dtype=torch.uint8).view(DTYPES[raw[0]]).reshape(raw[1])


def to_raw(dtype: str, tensor: Any) -> Raw:
    assert tensor.dtype == DTYPES[dtype]
    return dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def values_of(module: str, dense: dict[str, Raw]) -> Any:
    """weight * scale in float32."""
    weight = to_torch(dense[f"{module}.weight"]).float()
    scale = dense.get(f"{module}.weight_scale_inv") or dense.get(f"{module}.weight_scale")
    if scale is None:
        return weight
    factor = to_torch(scale).float()
    if factor.numel() > 1 and factor.shape[1] > 1:
        tall, wide = (1, 32) if len(factor) == len(weight) else (128, 128)
        factor = factor.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
    return weight * factor


def reference(dense: dict[str, Raw], weights: str, quant_format: str) -> dict[str, Raw]:
    """What a converted checkpoint holds."""
    made: dict[str, Raw] = {}
    for module in dict.fromkeys(name.rsplit(".", 1)[0] for name in dense):
        values = values_of(module, dense)
        if weights == "bf16":
            made[f"{module}.weight"] = to_raw("BF16", values.to(torch.bfloat16))
            continue
        largest = values.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest == 0, torch.ones(1), largest / 127)
        if quant_format == "compressed-tensors":
            scale = scale.to(torch.bfloat16)
            made[f"{module}.weight_scale"] = to_raw("BF16", scale)
        else:
            made[f"{module}.weight_scale"] = to_raw("F32", scale)
            made[f"{module}.weight_offset"] = to_raw("F32", torch.zeros_like(scale))
        quantized = (values / scale.float()).round().clamp(-127, 127).to(torch.int8)
        made[f"{module}.weight"] = to_raw("I8", quantized)
    return made


def rewrite(folder: Path, changes: dict[str, Raw]) -> None:
    """Put other values into a checkpoint of one file."""
    (path,) = folder.glob("*.safetensors")
    tensors = read_safetensors(path)
    assert changes.keys() <= tensors.keys()
    write_safetensors(path, tensors | changes)


def one_file(recipe: str, **changes: Any) -> Spec:
    return Spec(recipe, files=1, index=False, **changes)


def bf16(values: Any) -> Raw:
    return to_raw("BF16", torch.as_tensor(values, dtype=torch.float32).to(torch.bfloat16))
