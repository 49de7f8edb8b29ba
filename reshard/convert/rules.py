"""What `--weights` makes of a checkpoint's linears: a new description, no values (reshard.convert.compute has those).

bf16  each block- or channel-scaled weight becomes weight * scale, rounded to BF16.
w8a8  each float weight becomes int8 with one scale per output channel over the full input dimension, symmetric:
      scale = max|w| / 127 or, where that is 0, 1; q = round(w / scale). As ModelSlim's W8A8_DYNAMIC (F32 scale, a
      zero offset) or as compressed-tensors has it (BF16 scale, no offset).

A linear that already is what is asked for stays as it is, bit for bit.
"""

from dataclasses import replace

from reshard.checkpoint.description import Checkpoint, Layer, Linear, Tensor
from reshard.convert.declared import declared
from reshard.errors import SchemeError
from reshard.manifest import Conversion
from reshard.model.naming import CONFIG
from reshard.quantization import without_quantization
from reshard.schemes.declare import COMPRESSED_TENSORS
from reshard.schemes.table import SCHEMES, VARIANTS, Variant, scheme_by_option
from reshard.strict_json import parse_object
from reshard.tensors.dtypes import TORCH

KEEP, BF16, W8A8 = "keep", "bf16", "w8a8"
MODELSLIM = "modelslim"

DEQUANTIZE, CAST, QUANTIZE = "dequantise_to_bf16", "cast_to_bf16", "quantise_to_int8_per_channel"


def converted(checkpoint: Checkpoint, weights: str, quant_format: str = MODELSLIM) -> Checkpoint:
    """The checkpoint with other weights; what tools do not quantize is not quantized.

    Raises SchemeError where a linear cannot become what is asked for.
    """
    variant = target(weights, quant_format) if weights != KEEP else None
    if variant is None or not (checkpoint.part.quantized or SCHEMES[variant.scheme].is_float):
        return checkpoint
    layers = tuple(
        replace(
            layer, linears={role: _linear(linear, layer.name(role), variant) for role, linear in layer.linears.items()}
        )
        for layer in checkpoint.layers
    )
    if layers == checkpoint.layers:
        return checkpoint
    return replace(checkpoint, layers=layers, side_files=_side_files(checkpoint, layers, variant))


def target(weights: str, quant_format: str = MODELSLIM) -> Variant:
    """What `--weights` makes: the scheme that has it as its option, as `--quant-format`'s tool writes it."""
    variants = [variant for variant in VARIANTS if variant.scheme == scheme_by_option(weights)]
    compressed = quant_format == COMPRESSED_TENSORS
    return min(variants, key=lambda variant: any(COMPRESSED_TENSORS in said for said in variant.said) != compressed)


def _linear(linear: Linear, module: str, target: Variant) -> Linear:
    scheme, made = SCHEMES[linear.variant.scheme], SCHEMES[target.scheme]
    weight = linear.tensors["weight"]
    if linear.variant == target and weight.dtype == target.tensors[0].dtypes[0]:
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
    if made.name not in scheme.becomes:
        convertible = sorted(name for name, one in SCHEMES.items() if made.name in one.becomes)
        raise SchemeError(
            f"{module}: is {linear.variant.kind} ({scheme.name}), which does not become {target.kind}; --weights "
            f"converts {', '.join(convertible)}: leave it at --weights keep"
        )
    conversion = _conversion(linear.variant, module, target)
    tensors = {
        one.suffix: Tensor(
            f"{module}.{one.suffix}", one.dtypes[0], one.shape.sizes(weight.shape, None)[0], (), conversion
        )
        for one in target.tensors
    }
    return Linear(target, None, tensors)


def _conversion(variant: Variant, module: str, target: Variant) -> Conversion:
    scheme, made = SCHEMES[variant.scheme], SCHEMES[target.scheme]
    rule = QUANTIZE if not made.is_float else CAST if scheme.is_float else DEQUANTIZE
    return Conversion(rule=rule, inputs=tuple(f"{module}.{tensor.suffix}" for tensor in variant.tensors))


def check_conversion(linear: Linear, module: str) -> None:
    """Raises SchemeError where what is said of a linear's conversion is nothing that `converted` does."""
    said = {tensor.conversion for tensor in linear.tensors.values()}
    if said == {None}:
        return
    known = [
        _conversion(variant, module, linear.variant)
        for variant in VARIANTS
        if linear.variant.scheme in SCHEMES[variant.scheme].becomes
    ]
    (first, *others) = said
    stored = any(linear.tensors[rule.suffix].dtype != rule.dtypes[0] for rule in linear.variant.tensors)
    if others or first not in known or stored:
        shown = " and ".join(f"made by {one.rule} of {', '.join(one.inputs)}" if one else "as stored" for one in said)
        raise SchemeError(f"{module}: {linear.variant.scheme}, {shown}, which no conversion gives")


def _side_files(checkpoint: Checkpoint, layers: tuple[Layer, ...], target: Variant) -> dict[str, bytes]:
    """config.json and the description as they are true of the converted part, which is all that a set holds.

    Every linear is of the target's kind now, or the conversion was refused.
    """
    raw = checkpoint.side_files.get(CONFIG)
    config = None if raw is None else without_quantization(parse_object(raw, CONFIG))
    for key in ("dtype", "torch_dtype"):
        if config is not None and key in config and SCHEMES[target.scheme].is_float:
            config[key] = TORCH[target.tensors[0].dtypes[0]]
    return declared(config, layers)
