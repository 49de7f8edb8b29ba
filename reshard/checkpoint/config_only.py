"""The DenseFFN that a config.json alone promises: layers, tensors, types and shapes, no file behind them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.checkpoint.describe import check_stacked, of_activations
from reshard.checkpoint.description import Checkpoint, Identity, Layer, Linear, Tensor
from reshard.checkpoint.places import check_untied
from reshard.errors import LayersError, SchemeError, SourceError
from reshard.limits import JSON_BYTES
from reshard.manifest import ModelDims
from reshard.model.config import ModelConfig, known_dense_layers, language_levels, read_model_config
from reshard.model.naming import CONFIG, PREFIX, WRAPPED, linear_name, module_name
from reshard.model.parts import DENSE_FFN, LM_HEAD, Part, Place
from reshard.model.prefix import head_prefix, is_known_wrapper, published_prefix
from reshard.quantization import Account, Accounts, check_transforms, list_accounts
from reshard.quantization.formats import as_kind
from reshard.quantization.refusals import words
from reshard.regular import read_whole, unreadable
from reshard.schemes.match import QuantSpec, check_kind, check_scheme
from reshard.schemes.table import FLOAT, VARIANTS, Operand
from reshard.strict_json import parse_object
from reshard.tensors.dtypes import TORCH

_DTYPES = {TORCH[dtype]: dtype for dtype in ("BF16", "F16", "F32")}


def read_config(path: str | Path) -> dict[str, Any]:
    """A config.json. Raises SourceError where it cannot be read."""
    try:
        raw = read_whole(Path(path), JSON_BYTES)
    except OSError as error:
        raise SourceError(unreadable(Path(path), error)) from error
    return parse_object(raw, str(path))


def config_checkpoint(
    config: Mapping[str, Any], name: str, scheme: str | None = None, part: Part = DENSE_FFN
) -> Checkpoint:
    """The checkpoint, every tensor without parts.

    scheme: one of reshard.schemes; None takes what the config's own quantization_config says (BF16 where it says
    nothing: ModelSlim's description of a quantized checkpoint is another file). Raises LayersError where no layer is
    dense, SourceError or SchemeError where the config says what is not understood, UsageError for an unknown scheme.
    """
    model = read_model_config(config)
    indexes = _indexes(part, model)
    accounts = list_accounts(Accounts(config))
    told = None if scheme is None else _told(scheme, accounts)
    prefix = head_prefix(config) if part.place is Place.HEAD else published_prefix(config)
    if part is DENSE_FFN:
        check_transforms(
            Accounts(config), {index: module_name(prefix, index) for index in indexes if index is not None}, ()
        )
    own, doubts = _own_dtype(config)
    layers = []
    for index in indexes:
        linears = {}
        for role in part.roles:
            module = linear_name(prefix, index, role.name, part)
            weight = (getattr(model, role.out), getattr(model, role.in_))
            spec = told or _declared(module, accounts)
            if not part.quantized:
                spec = QuantSpec(FLOAT, None, f"{module}, which tools do not quantize,")
            linears[role.name] = _linear(module, spec, weight, own)
        layers.append(Layer(index, linears, prefix, model.activation(index) if part is DENSE_FFN else None, part))
        check_stacked(layers[-1])
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    return Checkpoint(
        identity=Identity("folder", name, None, ()),
        model=ModelDims(
            model_type=model.model_type,
            **{size: getattr(model, size) for size in part.sizes},
            num_hidden_layers=model.num_hidden_layers,
            prefix=prefix,
        ),
        layers=tuple(layers),
        side_files={CONFIG: json.dumps(config).encode()},
        total_tensors=len(tensors),
        total_bytes=sum(tensor.nbytes for tensor in tensors),
        warnings=(
            *model.doubts,
            *doubts,
            *_of_prefix(config, scheme),
            *of_activations((layer for layer in layers if layer.activation), config=True),
        ),
    )


def _indexes(part: Part, model: ModelConfig) -> Sequence[int | None]:
    """The layers that have the part. Raises LayersError or SchemeError where the config does not give them."""
    if unsaid := [size for size in part.sizes if not getattr(model, size) and size != DENSE_FFN.size]:
        raise LayersError(f"{CONFIG}: does not say {unsaid[0]} ({model.model_type}); give the checkpoint")
    if part is LM_HEAD:
        check_untied(model)
    if not part.place.in_layers:
        return [None]
    if part.place is Place.LAYERS:
        return list(range(model.num_hidden_layers))
    dense = known_dense_layers(model)
    if not dense:
        raise LayersError(f"no dense layer: {CONFIG} ({model.reason}) gives none")
    if model.bias is not None:
        raise SchemeError(f"{CONFIG}: {model.bias} is set: dense layers with a bias are not cut by this version")
    return sorted(dense)


def _declared(module: str, accounts: Iterable[Account]) -> QuantSpec:
    """What the config's own accounts say. Where two differ, the tensors would have to say which is right."""
    said = [spec for account in accounts if (spec := account.declare(module)) is not None]
    for other in said[1:]:
        if (other.kind, other.block) != (said[0].kind, said[0].block):
            first, second = words(said[0], other)
            raise SchemeError(
                f"{module}: {said[0].said_by} says {first}, {other.said_by} says {second}: give the checkpoint, whose "
                "headers tell, or make both say what the weights are"
            )
    return said[0] if said else QuantSpec(FLOAT, None, f"{CONFIG} (no quantization_config)")


def _told(scheme: str, accounts: Iterable[Account]) -> QuantSpec:
    """--scheme; its block is the config's own where it has one."""
    check_scheme(scheme)
    variant = next(variant for variant in VARIANTS if variant.scheme == scheme)
    for account in accounts:
        if account.section is not None and isinstance(account.section.values.get("weight_block_size"), list):
            return as_kind(variant, account.section.block("weight_block_size"), "--scheme")
    return as_kind(variant, said_by="--scheme")


def _linear(module: str, spec: QuantSpec, weight: tuple[int, int], own: str) -> Linear:
    """What the first variant of the declared kind has."""
    check_kind(module, spec)
    variant = next(variant for variant in VARIANTS if variant.kind == spec.kind)
    block = variant.block or spec.block
    tensors = {
        rule.suffix: Tensor(
            f"{module}.{rule.suffix}",
            own if own in rule.dtypes and rule.operand is Operand.WEIGHT else rule.dtypes[0],
            rule.shape.sizes(weight, block)[0],
            (),
        )
        for rule in variant.tensors
    }
    return Linear(variant, block, tensors)


def _own_dtype(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The top's, which is the one that engines load with, or else a nested one's; and a line where they differ."""
    named: dict[str, Any] = {}
    for place, level in language_levels(config):
        value = level.get("dtype") or level.get("torch_dtype")
        if value is not None and value not in named.values():
            named[f"in {place}" if place else "at its top"] = value
    dtype = next(iter(named.values()), "bfloat16")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise SchemeError(f"{CONFIG}: dtype is {dtype!r}; a model of {', '.join(_DTYPES)} is split")
    said = ", ".join(f"{value} {place}" for place, value in named.items())
    lines = (f"{CONFIG} contradicts itself: dtype is {said}; taken as {dtype}",) if len(named) > 1 else ()
    return _DTYPES[dtype], lines


def _of_prefix(config: Mapping[str, Any], scheme: str | None) -> Iterator[str]:
    """Where the names in an account of the quantization may be others than those that were asked for."""
    if scheme is None and not is_known_wrapper(config) and list_accounts(Accounts(config)):
        yield (
            f"{CONFIG}: what precedes the layers' names in a {config.get('model_type')!r} is not known: its account of "
            f"the quantization was asked for {', '.join((*WRAPPED, PREFIX))}; the checkpoint's names would tell"
        )
