"""From tensor names, config.json and the account of the quantization to the dense layers: no tensor data is read."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from reshard.checkpoint.description import Layer, Linear, Model, Tensor, layers_named, numbers
from reshard.errors import LayersError, SchemeError, ShapesError
from reshard.model.activation import not_computed
from reshard.model.config import ModelConfig, agree_on_dense, is_mtp_layer, read_model_config
from reshard.model.foreign import what_is
from reshard.model.naming import (
    CONFIG,
    DOWN,
    GATE,
    GATE_UP,
    PREFIX,
    ROLES,
    UP,
    WRAPPED,
    mlp_name,
    parse_dense,
    parse_layer,
)
from reshard.model.prefix import language_prefix
from reshard.quantization import Accounts, Schemes, check_transforms
from reshard.schemes import VARIANTS, StoredTensor

_Roles = dict[str, dict[str, Tensor]]
"""Tensors by role and suffix."""

_BESIDE_A_WEIGHT = frozenset(suffix for variant in VARIANTS for suffix in variant.suffixes) - {"weight"}
_IN_BLOCKS = frozenset(rule.suffix for variant in VARIANTS for rule in variant.tensors if rule.in_blocks)


def describe_layers(
    tensors: Mapping[str, Tensor],
    other_names: Iterable[str],
    accounts: Accounts,
) -> tuple[Model, tuple[Layer, ...], tuple[str, ...]]:
    """The dense layers that the tensors make, checked against config.json and the accounts of the quantization.

    tensors: those whose names are a DenseFFN tensor's; other_names: all other names of the source.
    Returns the model, its layers and warnings. Raises LayersError, ShapesError or SchemeError where the accounts
    disagree.
    """
    other_names = list(other_names)
    model_config = read_model_config(accounts.config) if accounts.config is not None else None
    prefix = language_prefix(tensors, other_names, model_config)
    by_layer: dict[int, _Roles] = {}
    for name, tensor in tensors.items():
        parsed = parse_dense(name)
        if parsed is None or parsed.prefix != prefix:
            continue
        by_layer.setdefault(parsed.layer, {}).setdefault(parsed.role, {})[parsed.suffix] = tensor
    mtp = {layer: by_layer.pop(layer) for layer in _mtp_layers(by_layer, prefix, other_names, model_config)}
    mlps = {index: mlp_name(prefix, index) for index in by_layer}
    check_transforms(accounts, mlps, (*tensors, *other_names))
    by_names = _of_config(by_layer, model_config)
    warnings = [*by_names, *_of_prefix(prefix, bool(by_names)), *_left_alone(mtp)]
    _check_known(by_layer, prefix, other_names)
    schemes = Schemes(accounts, (*tensors, *other_names))
    layers = []
    for index in sorted(by_layer):
        roles = _unstacked(by_layer[index], mlps[index])
        linears = {}
        for role in ROLES:
            stored = GATE_UP if GATE_UP in by_layer[index] and role != DOWN else role
            module, suffixes = f"{mlps[index]}.{stored}", roles.get(role, {})
            if "weight" not in suffixes and suffixes.keys() <= _BESIDE_A_WEIGHT:
                raise _missing_weight(module, index, roles, gated=_has_gate(by_layer.values(), model_config))
            found = {suffix: StoredTensor(t.dtype, t.shape, t.parts[0].file) for suffix, t in suffixes.items()}
            variant, block = schemes.decide(module, found)
            linears[role] = Linear(variant, block, suffixes)
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


def _unstacked(roles: _Roles, module: str) -> _Roles:
    """Gate and up as runs of rows where they are stored stacked, gate first (Phi-3, GLM-4-0414)."""
    stacked = roles.get(GATE_UP)
    if stacked is None:
        return roles
    for role in (GATE, UP):
        if role in roles:
            raise LayersError(
                f"{module}: has {GATE_UP} and {role}, and a checkpoint has gate and up stacked or apart; it is put "
                "together from two: give one of them"
            )
    halves: _Roles = {GATE: {}, UP: {}, **{role: found for role, found in roles.items() if role != GATE_UP}}
    for suffix, tensor in stacked.items():
        if tensor.rows == 1:  # one value for both
            halves[GATE][suffix] = halves[UP][suffix] = tensor
            continue
        rows, odd = divmod(tensor.rows, 2)
        if odd and suffix in _IN_BLOCKS and "weight" in stacked:
            raise SchemeError(
                f"{tensor.name}: shape {list(tensor.shape)}: gate and up are stacked in {stacked['weight'].rows} rows, "
                f"and a block of scales is of both; a checkpoint with {GATE} and {UP} is needed"
            )
        if odd:
            raise ShapesError(f"{tensor.name}: shape {list(tensor.shape)}; gate and up stacked have an even dim 0")
        halves[GATE][suffix], halves[UP][suffix] = tensor.run(0, rows), tensor.run(rows, rows)
    return halves


def _has_gate(layers: Iterable[_Roles], config: ModelConfig | None) -> bool:
    """Whether the MLP has gate_proj: by the family's code, or as any layer shows."""
    return (config is not None and config.is_known) or any(GATE in roles or GATE_UP in roles for roles in layers)


def _missing_weight(module: str, index: int, roles: Mapping[str, Mapping[str, Tensor]], *, gated: bool) -> LayersError:
    having = ", ".join(sorted(f"{r}.{s}" for r, suffixes in roles.items() for s in suffixes))
    if not gated:
        return LayersError(
            f"{module}.weight: missing, as in every layer; the checkpoint has of layer {index} only {having}: an MLP "
            "without a gate (Nemotron-4, Arcee), or with the gate in up_proj, which this version does not cut"
        )
    return LayersError(
        f"{module}.weight: missing; the checkpoint has of layer {index} only {having}; download the file that holds it "
        "again"
    )


def _check_known(dense: Collection[int], prefix: str, other_names: Iterable[str]) -> None:
    for name in other_names:
        parsed = parse_layer(name)
        if parsed and parsed[0] == prefix and parsed[1] in dense and parsed[2].startswith("mlp."):
            what = what_is(name)
            said = f" ({what})" if what else ""
            raise SchemeError(f"{name}: stands in a dense layer and is no tensor that the split table knows{said}")


def _check_shapes(layers: list[Layer], config: ModelConfig | None) -> Model:
    first = layers[0].linears[GATE].tensors["weight"]
    intermediate_size, hidden_size = first.shape
    where = first.name
    if config is not None:
        intermediate_size, hidden_size, where = config.intermediate_size, config.hidden_size, CONFIG
    for layer in layers:
        gate, up = layer.linears[GATE], layer.linears[UP]
        for role in ROLES:
            weight = layer.linears[role].tensors["weight"]
            wanted = (hidden_size, intermediate_size) if role == DOWN else (intermediate_size, hidden_size)
            if weight.shape != wanted:
                raise ShapesError(
                    f"{weight.name} in {weight.parts[0].file}: {role} has shape {list(weight.shape)}, {where} makes it "
                    f"{list(wanted)} (hidden_size {hidden_size}, intermediate_size {intermediate_size}); is {where} "
                    "of this checkpoint?"
                )
        check_pair(layer.module, gate, up)
        _check_stacked_blocks(gate)
    return Model(
        model_type=config.model_type if config else "",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=config.num_hidden_layers if config else None,
        prefix=layers[0].prefix,
    )


def check_pair(module: str, gate: Linear, up: Linear) -> None:
    """Raises SchemeError where gate and up differ: they are stacked."""
    if gate.variant != up.variant:
        raise SchemeError(
            f"{module}: gate_proj is {gate.variant.scheme} ({', '.join(gate.tensors)}), up_proj is "
            f"{up.variant.scheme} ({', '.join(up.tensors)}); they are stacked, so both must be the same"
        )
    for suffix, tensor in gate.tensors.items():
        other = up.tensors[suffix]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            raise SchemeError(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, {other.name} is {other.dtype} "
                f"{list(other.shape)}; they are stacked, so both must be the same"
            )


def _check_stacked_blocks(gate: Linear) -> None:
    """A block of scales that holds the end of gate and the beginning of up cannot be taken apart."""
    weight = gate.tensors["weight"]
    if weight.whole is not None and gate.block is not None and weight.rows % gate.block[0]:
        raise SchemeError(
            f"{weight.name}: gate and up are stacked, and gate's {weight.rows} rows are no multiple of the "
            f"{gate.block[0]}-row scale block: a block would be of both; a checkpoint with gate_proj and up_proj is "
            "needed"
        )
