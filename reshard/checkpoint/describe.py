"""From tensor names, config.json and the account of the quantization to the dense layers: no tensor data is read."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from reshard import limits
from reshard.checkpoint.description import Layer, Linear, Tensor
from reshard.errors import LayersError, SchemeError, ShapesError
from reshard.manifest import ModelDims
from reshard.model.activation import not_computed
from reshard.model.config import ModelConfig, agree_on_dense, is_mtp_layer, read_model_config
from reshard.model.foreign import what_is
from reshard.model.naming import (
    CONFIG,
    PREFIX,
    WRAPPED,
    layer_name,
    layers_named,
    module_name,
    numbers,
    parse_dense,
    parse_layer,
)
from reshard.model.parts import DENSE_FFN, Module
from reshard.model.prefix import language_prefix
from reshard.quantization import Accounts, Schemes, check_transforms
from reshard.schemes.match import StoredTensor
from reshard.schemes.table import VARIANTS

_Linears = dict[str, dict[str, Tensor]]
"""Tensors by the linear's name and suffix."""

_BESIDE_A_WEIGHT = frozenset(suffix for variant in VARIANTS for suffix in variant.suffixes) - {"weight"}
_IN_BLOCKS = frozenset(rule.suffix for variant in VARIANTS for rule in variant.tensors if rule.in_blocks)


def describe_layers(
    tensors: Mapping[str, Tensor],
    other_names: Iterable[str],
    accounts: Accounts,
) -> tuple[ModelDims, tuple[Layer, ...], tuple[str, ...]]:
    """The dense layers that the tensors make, checked against config.json and the accounts of the quantization.

    tensors: those whose names are a DenseFFN tensor's; other_names: all other names of the source.
    Returns the model, its layers and warnings. Raises LayersError, ShapesError or SchemeError where the accounts
    disagree.
    """
    other_names = list(other_names)
    model_config = read_model_config(accounts.config) if accounts.config is not None else None
    prefix = language_prefix(tensors, other_names, model_config)
    by_layer: dict[int, _Linears] = {}
    for name, tensor in tensors.items():
        parsed = parse_dense(name)
        if parsed is None or parsed.prefix != prefix:
            continue
        by_layer.setdefault(parsed.layer, {}).setdefault(parsed.role, {})[parsed.suffix] = tensor
    if (last := max(by_layer)) >= limits.LAYERS:
        raise LayersError(f"{layer_name(prefix, last)}: more than {limits.LAYERS} layers, which no model has")
    mtp = {layer: by_layer.pop(layer) for layer in _mtp_layers(by_layer, prefix, other_names, model_config)}
    mlps = {index: module_name(prefix, index) for index in by_layer}
    check_transforms(accounts, mlps, (*tensors, *other_names))
    by_names = _of_config(by_layer, model_config)
    warnings = [*by_names, *_of_prefix(prefix, bool(by_names)), *_left_alone(mtp)]
    _check_known(by_layer, prefix, other_names)
    schemes = Schemes(accounts, (*tensors, *other_names))
    layers = []
    for index in sorted(by_layer):
        unstacked = _unstacked(by_layer[index], mlps[index])
        linears = {}
        for role in DENSE_FFN.roles:
            stack = DENSE_FFN.stack(role.name)
            module = f"{mlps[index]}.{stack if stack in by_layer[index] else role.name}"
            suffixes = unstacked.get(role.name, {})
            if "weight" not in suffixes and suffixes.keys() <= _BESIDE_A_WEIGHT:
                known = model_config is not None and model_config.is_known
                nowhere = not known and not any({stack, role.name} & held.keys() for held in by_layer.values())
                raise _missing_weight(module, index, unstacked, role.without if nowhere else "")
            found = {suffix: StoredTensor(t.dtype, t.shape, t.extents[0].file) for suffix, t in suffixes.items()}
            variant, block = schemes.decide(module, found)
            linears[role.name] = Linear(variant, block, suffixes)
        activation = model_config.activation(index) if model_config else None
        layers.append(Layer(index, linears, prefix, activation))
    model = _check_shapes(layers, model_config)
    return (
        model,
        tuple(layers),
        (*warnings, *schemes.warnings(), *of_activations(layers, config=model_config is not None)),
    )


def of_activations(layers: Iterable[Layer], *, config: bool) -> Iterator[str]:
    """Layers that can be cut, and that nothing here computes. config: whether there is a config.json."""
    indexes: dict[str, list[int]] = {}
    for layer in layers:
        problem = not_computed(layer.activation, config=config)
        if problem is not None:
            indexes.setdefault(problem, []).append(layer.index)
    for problem, found in indexes.items():
        yield f"{layers_named(found)} {'is' if len(found) == 1 else 'are'} cut and not computed: {problem}"


def _of_config(named: Collection[int], config: ModelConfig | None) -> tuple[str, ...]:
    """Where the names alone say which layers are dense."""
    if config is None:
        return (f"no {CONFIG} beside the files: the dense layers ({numbers(named)}) are taken from names alone",)
    return agree_on_dense(named, config)


def _of_prefix(prefix: str, by_names: bool) -> Iterator[str]:
    """Where the names alone say which module is the language model."""
    if prefix not in {"", PREFIX} and (by_names or prefix not in WRAPPED):
        yield f"the language model is taken to be {prefix}layers.*, by names alone"


def _left_alone(mtp: Collection[int]) -> Iterator[str]:
    if mtp:
        yield f"the dense MLP of the MTP {layers_named(mtp)} is left alone: it is no part of the DenseFFN"


def _mtp_layers(
    named: Iterable[int], prefix: str, other_names: Iterable[str], config: ModelConfig | None
) -> tuple[int, ...]:
    """Those of the layers that are multi-token prediction: by config.json's count, or by what else is in them."""
    rests: dict[int, list[str]] = {}
    for name in other_names:
        parsed = parse_layer(name)
        if parsed and parsed[0] == prefix:
            rests.setdefault(parsed[1], []).append(parsed[2])
    last = config.num_hidden_layers if config else None
    count = config.mtp_layers if config else 0
    return tuple(
        layer
        for layer in named
        if (last is not None and 0 <= layer - last < count)
        or ((last is None or layer >= last) and is_mtp_layer(rests.get(layer, ())))
    )


def _unstacked(linears: _Linears, parent: str) -> _Linears:
    """Linears as runs of rows where they are stored stacked (Phi-3, GLM-4-0414)."""
    found = dict(linears)
    for module in DENSE_FFN.modules:
        if len(module.roles) == 1 or module.name not in linears:
            continue
        stacked = found.pop(module.name)
        for role in module.roles:
            if role.name in found:
                raise LayersError(
                    f"{parent}: has {module.name} and {role.name}, and a checkpoint has {module} stacked or apart; it "
                    "is put together from two: give one of them"
                )
        found |= {role.name: {} for role in module.roles}
        for suffix, tensor in stacked.items():
            for role, run in zip(module.roles, _runs(tensor, module, suffix, stacked), strict=True):
                found[role.name][suffix] = run
    return found


def _runs(tensor: Tensor, module: Module, suffix: str, stacked: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A stacked tensor taken apart."""
    count = len(module.roles)
    if tensor.rows == 1:  # one value for all
        return (tensor,) * count
    rows, odd = divmod(tensor.rows, count)
    if odd and suffix in _IN_BLOCKS and "weight" in stacked:
        raise SchemeError(
            f"{tensor.name}: shape {list(tensor.shape)}: {module} are stacked in {stacked['weight'].rows} rows, and a "
            "block of scales is of both; a checkpoint that has them apart is needed"
        )
    if odd:
        raise ShapesError(
            f"{tensor.name}: shape {list(tensor.shape)}; with {module} stacked, dim 0 must be a multiple of {count}"
        )
    return tuple(tensor.run(at * rows, rows) for at in range(count))


def _missing_weight(module: str, index: int, linears: _Linears, without: str) -> LayersError:
    having = ", ".join(sorted(f"{r}.{s}" for r, suffixes in linears.items() for s in suffixes))
    has = f"the checkpoint has of layer {index} only {having}"
    if without:
        return LayersError(
            f"{module}.weight: missing, as in every layer; {has}: {without}, which this version does not cut"
        )
    return LayersError(f"{module}.weight: missing; {has}; download the file that holds it again")


def _check_known(dense: Collection[int], prefix: str, other_names: Iterable[str]) -> None:
    for name in other_names:
        parsed = parse_layer(name)
        if parsed and parsed[0] == prefix and parsed[1] in dense and parsed[2].startswith(f"{DENSE_FFN.path}."):
            what = what_is(name)
            said = f" ({what})" if what else ""
            raise SchemeError(f"{name}: in a dense layer, and not a tensor that the table of schemes knows{said}")


def _check_shapes(layers: Sequence[Layer], config: ModelConfig | None) -> ModelDims:
    sizes, where = _sizes_of_weights(layers[0]), layers[0].linears[DENSE_FFN.roles[0].name].tensors["weight"].name
    if config is not None:
        sizes, where = {name: getattr(config, name) for name in sizes}, CONFIG
    dims = ModelDims(
        model_type=config.model_type if config else "",
        num_hidden_layers=config.num_hidden_layers if config else None,
        prefix=layers[0].prefix,
        **sizes,
    )
    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    for layer in layers:
        for role in layer.part.roles:
            weight = layer.linears[role.name].tensors["weight"]
            expected = (sizes[role.out], sizes[role.in_])
            if weight.shape != expected:
                raise ShapesError(
                    f"{weight.name} in {weight.extents[0].file}: {role.name} has shape {list(weight.shape)}, {where} "
                    f"makes it {list(expected)} ({said}); is {where} of this checkpoint?"
                )
        check_stacked(layer)
    return dims


def _sizes_of_weights(layer: Layer) -> dict[str, int]:
    """The model's sizes as the first weight has them."""
    role = layer.part.roles[0]
    out, in_ = layer.linears[role.name].tensors["weight"].shape
    return {role.in_: in_, role.out: out}


def check_stacked(layer: Layer) -> None:
    """Raises SchemeError where linears that are stacked in the fused layout differ, or share a block of scales."""
    for module, (first, *others) in layer.modules("fused"):
        for role, other in zip(module.roles[1:], others, strict=True):
            if first.variant != other.variant:
                kinds = ", ".join(
                    f"{name} is {linear.variant.scheme} ({', '.join(linear.tensors)})"
                    for name, linear in ((module.roles[0].name, first), (role.name, other))
                )
                raise SchemeError(f"{layer.module}: {kinds}; they are stacked, so both must be the same")
            for suffix, tensor in first.tensors.items():
                found = other.tensors[suffix]
                if (tensor.dtype, tensor.shape) != (found.dtype, found.shape):
                    raise SchemeError(
                        f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, {found.name} is {found.dtype} "
                        f"{list(found.shape)}; they are stacked, so both must be the same"
                    )
        weight = first.tensors["weight"]
        if weight.whole is not None and first.block is not None and weight.rows % first.block[0]:
            raise SchemeError(
                f"{weight.name}: {module} are stacked, and the {weight.rows} rows of each are no multiple of the "
                f"{first.block[0]}-row scale block: a block would be of both; a "
                "checkpoint that has them apart is needed"
            )
