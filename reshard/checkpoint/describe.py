"""From tensor names, config.json and the account of the quantization to a part's layers: no tensor data is read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from reshard.checkpoint.description import Layer, Linear, Tensor
from reshard.checkpoint.places import Found, Linears, find
from reshard.errors import LayersError, SchemeError, ShapesError
from reshard.manifest import ModelDims
from reshard.model.activation import not_computed
from reshard.model.config import ModelConfig, read_model_config
from reshard.model.foreign import what_is
from reshard.model.naming import CONFIG, layers_named, linear_name, module_name, parse_layer
from reshard.model.parts import DENSE_FFN, Module, Part, Place
from reshard.quantization import Accounts, Schemes, check_transforms
from reshard.schemes.match import QuantSpec, StoredTensor, is_plain, match_variant
from reshard.schemes.table import FLOAT, VARIANTS, Variant

_BESIDE_A_WEIGHT = frozenset(suffix for variant in VARIANTS for suffix in variant.suffixes) - {"weight"}
_IN_BLOCKS = frozenset(rule.suffix for variant in VARIANTS for rule in variant.tensors if rule.in_blocks)


def describe_layers(
    tensors: Mapping[str, Tensor],
    other_names: Iterable[str],
    accounts: Accounts,
    part: Part = DENSE_FFN,
) -> tuple[ModelDims, tuple[Layer, ...], tuple[str, ...]]:
    """The layers that the tensors of a part make, checked against config.json and the accounts of the quantization.

    tensors: those whose names are a part's tensor's; other_names: all other names of the source.
    Returns the model, its layers and warnings. Raises LayersError, ShapesError or SchemeError where the accounts
    disagree.
    """
    other_names = list(other_names)
    model_config = read_model_config(accounts.config) if accounts.config is not None else None
    found = find(part, tensors, other_names, model_config, whole=accounts.recorded is None)
    if part is DENSE_FFN:  # what is in front of others' linears is the engine's to apply, to a slice as to the whole
        mlps = {index: module_name(found.prefix, index) for index in found.indexes}
        check_transforms(accounts, mlps, (*tensors, *other_names))
    _check_known(part, found, other_names)
    schemes = Schemes(accounts, (*tensors, *other_names), part)
    layers = []
    for index in sorted(found.linears, key=lambda index: -1 if index is None else index):
        linears = _linears(part, found, index, schemes, model_config)
        activation = model_config.activation(index) if model_config and part.place is Place.DENSE_LAYERS else None
        layers.append(Layer(index, linears, found.prefix, activation, part))
    model = _check_shapes(part, layers, model_config)
    return (
        model,
        tuple(layers),
        (*found.warnings, *schemes.warnings(), *of_activations(layers, config=model_config is not None)),
    )


def _linears(
    part: Part, found: Found, index: int | None, schemes: Schemes, config: ModelConfig | None
) -> dict[str, Linear]:
    """Those of one layer, by role."""
    held = found.linears[index]
    unstacked = _unstacked(part, held, module_name(found.prefix, index, part))
    linears = {}
    for role in part.roles:
        stack = part.stack(role.name)
        module = linear_name(found.prefix, index, stack if stack and stack in held else role.name, part)
        suffixes = unstacked.get(role.name, {})
        if "weight" not in suffixes and suffixes.keys() <= _BESIDE_A_WEIGHT:
            known = config is not None and config.is_known
            nowhere = not known and not any({stack, role.name} & layer.keys() for layer in found.linears.values())
            raise _missing_weight(module, index, unstacked, role.without if nowhere else "")
        stored = {suffix: StoredTensor(t.dtype, t.shape, t.extents[0].file) for suffix, t in suffixes.items()}
        variant, block = _decided(part, module, stored, schemes)
        linears[role.name] = Linear(variant, block, suffixes)
    return linears


def _decided(
    part: Part, module: str, stored: Mapping[str, StoredTensor], schemes: Schemes
) -> tuple[Variant, tuple[int, int] | None]:
    """A linear's variant and scale block."""
    if not part.quantized and is_plain(stored):
        said_by = f"{module}, which tools do not quantize,"
        return match_variant(module, QuantSpec(FLOAT, None, said_by), stored), None
    return schemes.decide(module, stored)


def of_activations(layers: Iterable[Layer], *, config: bool) -> Iterator[str]:
    """Dense layers that can be cut, and that nothing here computes. config: whether there is a config.json."""
    indexes: dict[str, list[int]] = {}
    for layer in layers:
        problem = not_computed(layer.activation, config=config) if layer.part is DENSE_FFN else None
        if problem is not None and layer.index is not None:
            indexes.setdefault(problem, []).append(layer.index)
    for problem, found in indexes.items():
        yield f"{layers_named(found)} {'is' if len(found) == 1 else 'are'} cut and not computed: {problem}"


def _unstacked(part: Part, linears: Linears, parent: str) -> Linears:
    """Linears as runs of rows where they are stored stacked (Phi-3, GLM-4-0414)."""
    found = dict(linears)
    for module in part.modules:
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


def _missing_weight(module: str, index: int | None, linears: Linears, without: str) -> LayersError:
    having = ", ".join(sorted(f"{r}.{s}" for r, suffixes in linears.items() for s in suffixes))
    has = f"the checkpoint has {'' if index is None else f'of layer {index} '}only {having}"
    if without:
        return LayersError(
            f"{module}.weight: missing, as in every layer; {has}: {without}, which this version does not cut"
        )
    return LayersError(f"{module}.weight: missing; {has}; download the file that holds it again")


def _check_known(part: Part, found: Found, other_names: Iterable[str]) -> None:
    """Nothing else may be in a dense layer's MLP, nor below another part's linears."""
    if part.place is Place.DENSE_LAYERS:
        owned = tuple(f"{module_name(found.prefix, index)}." for index in found.indexes)
    else:
        owned = tuple(f"{linear_name(found.prefix, i, role.name, part)}." for i in found.linears for role in part.roles)
    for name in other_names:
        parsed = parse_layer(name)
        layer = parsed[1] if parsed and parsed[0] == found.prefix else None
        if layer in found.linears and name.startswith(owned):
            what = what_is(name)
            said = f" ({what})" if what else ""
            where = "in a dense layer" if part.place is Place.DENSE_LAYERS else f"below {part.name}"
            raise SchemeError(f"{name}: {where}, and not a tensor that the table of schemes knows{said}")


def _check_shapes(part: Part, layers: Sequence[Layer], config: ModelConfig | None) -> ModelDims:
    sizes, where = _sizes_of_weights(layers[0]), layers[0].linears[part.roles[0].name].tensors["weight"].name
    if config is not None:
        sizes, where = {name: getattr(config, name) or size for name, size in sizes.items()}, CONFIG
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
